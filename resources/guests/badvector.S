/*
 * Turns paging on, and forgets to map the trap handler. The first trap makes the hart fetch the
 * handler, which is a page fault, whose handler is the same: for ever, without any exit.
 * rvmm: ends only by a signal.
 */
#include "common.inc"

#define SATP_SV39       8
#define PTE_SUPERVISOR  0xcf        /* dirty, accessed, executable, writable, readable, valid */
#define UNMAPPED        0x40001000

main:
    /* RAM, a gigabyte, at its own address. */
    lla     t0, root
    li      t1, (RAM >> 2) | PTE_SUPERVISOR
    sd      t1, (8 * 2)(t0)
    li      t1, UNMAPPED
    csrw    stvec, t1
    print   "turning paging on\n"
    lla     t0, root
    srli    t0, t0, 12
    li      t1, SATP_SV39 << 60
    or      t0, t0, t1
    csrw    satp, t0
    sfence.vma
    li      t0, 0x50000000
    ld      t0, 0(t0)
1:  j       1b

    .bss
    .balign 4096
root:
    .space  4096
