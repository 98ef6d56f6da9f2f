/*
 * Code that has two virtual addresses: RAM is mapped at its own address, and at ALIAS. The guest
 * calls a function through both in turn, until somebody types a byte.
 * rvmm: two lines, exit status 0.
 */
#include "common.inc"

#define SATP_SV39       8
#define PTE_SUPERVISOR  0xcf        /* dirty, accessed, executable, writable, readable, valid */
#define ALIAS           0x4000000000

    .globl  main, worker

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    /* A gigabyte each. The tables' index of ALIAS is 256: it is the first of the upper half. */
    lla     t0, root
    li      t1, (RAM >> 2) | PTE_SUPERVISOR
    sd      t1, (8 * 2)(t0)
    li      t2, 8 * 258
    add     t0, t0, t2
    sd      t1, 0(t0)
    lla     t0, root
    srli    t0, t0, 12
    li      t1, SATP_SV39 << 60
    or      t0, t0, t1
    csrw    satp, t0
    sfence.vma
    print   "paging is on\n"
    li      s2, 0
1:  lla     s3, worker
    jalr    s3
    /* The alias has all upper bits set. */
    li      t0, -ALIAS
    add     s3, s3, t0
    jalr    s3
    lla     a1, byte
    li      a0, 1
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_READ
    beqz    a1, 1b
    print   "typed\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

worker:
    addi    s2, s2, 1
    ret

    .bss
    .balign 4096
root:
    .space  4096
byte:
    .space  8
