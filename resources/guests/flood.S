/*
 * Writes 1 MiB through DBCN, faster than anybody reads: 16384 lines of 64 bytes, each with its
 * number. The console may accept fewer bytes than it is given, and then returns the number; nothing
 * may be lost.
 * rvmm: exit status 0.
 */
#include "common.inc"

#define LINES       16384
#define BLOCK       64              /* lines in one call */
#define LINE_LEN    64
#define DIGITS      8

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)

    li      s2, 0                   /* number of the next line */
1:  lla     s3, block
    li      s4, BLOCK
2:  /* "flood <8 digits> ........\n" */
    mv      t0, s3
    lla     t1, template
    li      t2, LINE_LEN / 8
3:  ld      t3, 0(t1)
    sd      t3, 0(t0)
    addi    t0, t0, 8
    addi    t1, t1, 8
    addi    t2, t2, -1
    bnez    t2, 3b
    addi    t0, s3, 6 + DIGITS      /* behind the last digit */
    mv      t1, s2
    li      t2, DIGITS
    li      t4, 10
4:  remu    t3, t1, t4
    divu    t1, t1, t4
    addi    t3, t3, '0'
    addi    t0, t0, -1
    sb      t3, 0(t0)
    addi    t2, t2, -1
    bnez    t2, 4b
    addi    s2, s2, 1
    addi    s3, s3, LINE_LEN
    addi    s4, s4, -1
    bnez    s4, 2b

    lla     a0, block
    li      a1, BLOCK * LINE_LEN
    call    print_bytes
    li      t0, LINES
    bltu    s2, t0, 1b

    print   "flood: done\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

    .section .rodata
    .balign 8
template:
    .ascii  "flood 00000000 ................................................\n"
    .if     . - template - LINE_LEN
    .error  "a line must have LINE_LEN bytes"
    .endif

    .bss
    .balign 8
block:
    .space  BLOCK * LINE_LEN
