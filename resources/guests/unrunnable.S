/*
 * Jumps to an address without memory, takes the fault, and in its handler runs an instruction on a
 * device that no kernel emulates (see amo.S).
 * rvmm: exit status 122.
 */
#include "common.inc"

#define NO_CODE     0x04000000

main:
    on_trap fault
    print   "jumping\n"
    li      t0, NO_CODE
    jr      t0

    .balign 4
fault:
    csrr    s2, scause
    print   "fault: cause="
    mv      a0, s2
    call    print_dec
    print   "\n"
    li      t0, NOWHERE
    li      t1, 1
    amoadd.w t2, t1, (t0)
    print   "amo: went on\n"
    ret
