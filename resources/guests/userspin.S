/*
 * A user program that makes one system call, and then spins right behind it for ever.
 * rvmm: ends only by a signal. The hart gets on all the time.
 */
#include "common.inc"

#define SSTATUS_SPP     0x100

main:
    on_trap serve
    li      t0, SSTATUS_SPP
    csrc    sstatus, t0
    lla     t0, user
    csrw    sepc, t0
    sret

    .balign 4
user:
    ecall
1:  j       1b

    .balign 4
serve:
    csrr    t0, sepc
    addi    t0, t0, 4
    csrw    sepc, t0
    print   "user mode\n"
    sret
