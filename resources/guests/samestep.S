/*
 * A trap handler with the usual mistake: it does not advance sepc, so the hart executes the same
 * instruction again and again. The instruction reads a CSR of the hypervisor, which a guest cannot
 * access.
 * rvmm: ends only by a signal.
 */
#include "common.inc"

main:
    on_trap again
    print   "stepping\n"
    csrr    t0, 0x680               /* hgatp */
    print   "went on\n"
    ret

    .balign 4
again:
    addi    sp, sp, -32
    sd      t0, 0(sp)
    sd      t1, 8(sp)
    lla     t0, count
    ld      t1, 0(t0)
    addi    t1, t1, 1
    sd      t1, 0(t0)
    ld      t1, 8(sp)
    ld      t0, 0(sp)
    addi    sp, sp, 32
    sret

    .bss
    .balign 8
count:
    .space  8
