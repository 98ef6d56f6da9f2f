/*
 * Busy with page faults: takes a page out of its page table, stores to it, and the handler maps it
 * again.
 * rvmm: ends only by a signal. The hart gets on all the time.
 */
#include "common.inc"

#define SATP_SV39       8
#define PTE_SUPERVISOR  0xcf        /* dirty, accessed, executable, writable, readable, valid */
#define PTE_TABLE       0x01
#define AT              0xc0000000

main:
    /* RAM at its own address, and a page at AT. */
    lla     t0, root
    li      t1, (RAM >> 2) | PTE_SUPERVISOR
    sd      t1, (8 * 2)(t0)
    lla     t1, middle
    srli    t1, t1, 2
    ori     t1, t1, PTE_TABLE
    sd      t1, (8 * 3)(t0)
    lla     t1, last
    srli    t1, t1, 2
    ori     t1, t1, PTE_TABLE
    lla     t2, middle
    sd      t1, 0(t2)
    srli    t0, t0, 12
    li      t1, SATP_SV39 << 60
    or      s2, t0, t1
    print   "faulting\n"
    on_trap map_it
    csrw    satp, s2
    sfence.vma
    li      s3, AT
    lla     s4, last
1:  sd      zero, 0(s4)
    sfence.vma s3
    sd      s5, 0(s3)
    addi    s5, s5, 1
    j       1b

    .balign 4
map_it:
    lla     t1, page
    srli    t1, t1, 2
    ori     t1, t1, PTE_SUPERVISOR
    sd      t1, 0(s4)
    sfence.vma s3
    sret

    .bss
    .balign 4096
root:
    .space  4096
middle:
    .space  4096
last:
    .space  4096
page:
    .space  4096
