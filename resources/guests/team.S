/*
 * For a debugger: four harts. Three of them count for ever, each in its own word. The first starts
 * them, and waits until somebody types a byte.
 * rvmm: needs --cpus 4; two lines, exit status 0.
 */
#include "common.inc"

#define HARTS       4
#define SBI_HSM     0x48534d
#define HSM_START   0

    .globl  main, count, counts

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    li      s2, 0
1:  beq     s2, s0, 2f
    mv      a0, s2
    lla     a1, second
    mv      a2, s2
    sbi     SBI_HSM, HSM_START
    bnez    a0, fail
2:  addi    s2, s2, 1
    li      t0, HARTS
    bltu    s2, t0, 1b
    /* until each of them has counted */
    lla     s3, counts
    li      s2, 0
1:  beq     s2, s0, 2f
    slli    t0, s2, 3
    add     t0, s3, t0
    ld      t1, 0(t0)
    beqz    t1, 1b
2:  addi    s2, s2, 1
    li      t0, HARTS
    bltu    s2, t0, 1b
    print   "started\n"
3:  lla     a1, byte
    li      a0, 1
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_READ
    beqz    a1, 3b
    print   "typed\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/* A hart that was started: a0 is its number. */
second:
    slli    t0, a0, 3
    lla     s2, counts
    add     s2, s2, t0
1:  call    count
    j       1b

/* count(s2 = address of the word) */
count:
    ld      t0, 0(s2)
    addi    t0, t0, 1
    sd      t0, 0(s2)
    ret

    .bss
    .balign 8
byte:
    .space  8
counts:
    .space  8 * HARTS
