/*
 * Jumps to where there is no memory, with a trap handler where there is none either: a hart takes one instruction access fault
 * after the other, and comes to nothing.
 * rvmm: exit status 122 where KVM leaves the fault to it (before Linux 7.x); else the hart spins inside KVM.
 */
#include "common.inc"

#define NO_CODE     0x04000000

main:
    print   "jumping\n"
    li      t0, NO_CODE
    csrw    stvec, t0
    li      t0, NO_CODE + 0x100
    jr      t0
