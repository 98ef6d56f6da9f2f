/*
 * Jumps to an address without memory, and has no trap handler: stvec is 0, where there is no memory
 * either.
 * rvmm: exit status 122 if KVM leaves the fault to it (before Linux 7.x); otherwise the hart takes
 * one instruction access fault after the other inside KVM, and rvmm finds that it gets nowhere.
 */
#include "common.inc"

main:
    print   "jumping\n"
    csrw    stvec, zero
    li      t0, 0x1234
    jr      t0
