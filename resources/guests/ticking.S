/*
 * Busy with timer interrupts: the handler sets the next one, a moment ahead.
 * rvmm: ends only by a signal. The hart gets on all the time.
 */
#include "common.inc"

#define SBI_TIME        0x54494d45
#define SIE_STIE        0x20
#define SSTATUS_SIE     0x02
#define TICKS           200

main:
    print   "ticking\n"
    on_trap tick
    li      t0, SIE_STIE
    csrs    sie, t0
    csrr    a0, time
    sbi     SBI_TIME, 0
    csrsi   sstatus, SSTATUS_SIE
1:  addi    s2, s2, 1
    j       1b

    .balign 4
tick:
    csrr    a0, time
    addi    a0, a0, TICKS
    sbi     SBI_TIME, 0
    sret
