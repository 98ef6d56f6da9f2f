/*
 * Prints the whole command line of its device tree: `bootargs: ` and the value of /chosen/bootargs.
 * rvmm: one line, exit status 0.
 */
#include "common.inc"

/* Devicetree Specification 0.4, sections 5.2 and 5.4. */
#define FDT_OFF_STRUCT      8
#define FDT_OFF_STRINGS     12
#define FDT_BEGIN_NODE      1
#define FDT_END_NODE        2
#define FDT_PROP            3
#define FDT_NOP             4

    .section .rodata
wanted:
    .asciz  "bootargs"

    .text

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    print   "bootargs: "
    addi    a0, s1, FDT_OFF_STRUCT
    call    be32
    add     s2, s1, a0              /* the next token */
    addi    a0, s1, FDT_OFF_STRINGS
    call    be32
    add     s3, s1, a0              /* the names of properties */

next:
    mv      a0, s2
    call    be32
    addi    s2, s2, 4
    li      t0, FDT_BEGIN_NODE
    beq     a0, t0, name
    li      t0, FDT_PROP
    beq     a0, t0, property
    li      t0, FDT_END_NODE
    beq     a0, t0, next
    li      t0, FDT_NOP
    beq     a0, t0, next
    j       fail                    /* the end, and no command line */

/* Skip a node's name, up to the next token. */
name:
    lbu     t0, 0(s2)
    addi    s2, s2, 1
    bnez    t0, name
    addi    s2, s2, 3
    andi    s2, s2, -4
    j       next

property:
    mv      a0, s2
    call    be32
    mv      s4, a0                  /* bytes of its value */
    addi    a0, s2, 4
    call    be32
    add     t0, s3, a0              /* its name */
    addi    s5, s2, 8               /* its value */
    add     s2, s5, s4
    addi    s2, s2, 3
    andi    s2, s2, -4
    lla     t1, wanted
1:  lbu     t2, 0(t0)
    lbu     t3, 0(t1)
    bne     t2, t3, next
    addi    t0, t0, 1
    addi    t1, t1, 1
    bnez    t2, 1b

    mv      a0, s5
    addi    a1, s4, -1              /* without its NUL */
    call    print_bytes
    print   "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/* be32(a0 = address): the big-endian word there */
be32:
    lbu     t0, 0(a0)
    lbu     t1, 1(a0)
    lbu     t2, 2(a0)
    lbu     t3, 3(a0)
    slli    t0, t0, 24
    slli    t1, t1, 16
    slli    t2, t2, 8
    or      t0, t0, t1
    or      t2, t2, t3
    or      a0, t0, t2
    ret
