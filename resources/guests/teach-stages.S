/*
 * Two-stage translation (docs/guests/teach-stages.md): maps a virtual address by three levels of
 * page tables, follows them by hand, and then waits at that address.
 * rvmm: ends only by a signal, or by rvmm ctl.
 */
#include "common.inc"
#include "teach.inc"

    .section .rodata
waiting:
    .ascii  "waiting there\n"
    .set    WAITING_SIZE, . - waiting

    .text

#define SATP_SV39   8
#define PTE_TABLE   0x01
#define PTE_RWX     0xcf            /* dirty, accessed, executable, writable, readable, valid */
#define PTE_LEAF    0x0e            /* executable, writable, readable */
#define OFFSET      0x450
#define ADDRESS     ((1 << 30) | (2 << 21) | (3 << 12) | OFFSET)

/* Point entry \index of \table to \to. Clobbers t0, t1. */
.macro point table, index, to, bits
    lla     t0, \table
    lla     t1, \to
    srli    t1, t1, 2               /* the page number begins at bit 10 of an entry */
    ori     t1, t1, \bits
    sd      t1, (8 * \index)(t0)
.endm

main:
    lla     tp, line
    point   root, 1, middle, PTE_TABLE
    point   middle, 2, last, PTE_TABLE
    point   last, 3, page, PTE_RWX
    lla     t0, root
    li      t1, (RAM >> 2) | PTE_RWX
    sd      t1, (8 * 2)(t0)         /* RAM, a gigabyte, at its own address */
    srli    s3, t0, 12
    li      t1, SATP_SV39 << 60
    or      s3, s3, t1
    csrw    satp, s3
    sfence.vma

    li      s2, ADDRESS
    say     "virtual address "
    say_hex s2
    say     ", satp "
    say_hex s3
    end_line

    /* s3: the table, s4: its level, s5: the lowest bit of its index */
    lla     s3, root
    li      s4, 2
    li      s5, 12 + 2 * 9
1:  srl     s6, s2, s5
    andi    s6, s6, 511
    slli    s6, s6, 3
    add     s6, s6, s3              /* where the entry is */
    ld      s7, 0(s6)
    say     "level "
    say_digit s4
    say     ": entry "
    say_hex s7
    say     " at "
    say_hex s6
    end_line
    srli    s3, s7, 10
    slli    s3, s3, 12
    andi    t0, s7, PTE_LEAF
    bnez    t0, 2f
    addi    s4, s4, -1
    addi    s5, s5, -9
    bgez    s4, 1b
    j       fail

    /* A leaf. The bits of the address below its index are the offset. */
2:  li      t0, 1
    sll     t0, t0, s5
    addi    t0, t0, -1
    and     t0, t0, s2
    or      s3, s3, t0
    say     "guest-physical address "
    say_hex s3
    end_line
    lwu     s6, 0(s3)
    lwu     s7, 0(s2)
    say     "the word there: "
    say_hex s6
    say     ", read by its virtual address: "
    say_hex s7
    end_line

    li      a0, WAITING_SIZE
    lla     a1, waiting
    li      a2, 0
    li      a6, SBI_DBCN_WRITE
    li      a7, SBI_DBCN
    addi    s2, s2, -4              /* the ecall before it */
    jr      s2

/* The page that is mapped at ADDRESS. */
    .balign 4096
page:
    .space  OFFSET - 4
    .option push
    .option norvc
    ecall
1:  j       1b
    .option pop
    .balign 4096

    .bss
    .balign 4096
root:
    .space  4096
middle:
    .space  4096
last:
    .space  4096
line:
    .space  LINE_SIZE
