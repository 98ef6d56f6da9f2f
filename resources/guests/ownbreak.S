/*
 * Handles breakpoints of its own: two ebreaks, a short and a long one.
 * rvmm: two lines, exit status 0.
 */
#include "common.inc"

    .globl  main, short, long

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    on_trap handler
    .option push
    .option rvc
short:
    c.ebreak
    .option pop
    .balign 4
    print   "after the short one\n"
    .option push
    .option norvc
long:
    ebreak
    .option pop
    print   "after the long one\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/* Steps over a breakpoint. Any other trap, and a wrong sepc or stval, is a failure. */
    .balign 4
handler:
    csrr    t0, scause
    li      t1, 3
    bne     t0, t1, unexpected_trap
    csrr    t0, sepc
    lla     t1, short
    li      t2, 2
    beq     t0, t1, 1f
    lla     t1, long
    li      t2, 4
    bne     t0, t1, unexpected_trap
1:  add     t0, t0, t2
    csrw    sepc, t0
    sret
