/*
 * Jumps to an address without memory, and the trap handler's address has none either: the hart
 * takes one instruction access fault after the other, forever.
 * rvmm: exit status 122 if KVM leaves the fault to it (before Linux 7.x); otherwise the hart spins
 * inside KVM.
 */
#include "common.inc"

#define NO_CODE     0x04000000

main:
    print   "jumping\n"
    li      t0, NO_CODE
    csrw    stvec, t0
    li      t0, NO_CODE + 0x100
    jr      t0
