/*
 * Traps (docs/guests/teach-trap.md): an instruction that the hart may not execute, and a load from
 * a virtual address that is not mapped. The guest's own handler sees both, and steps over them. A
 * load from a guest-physical address where nothing is does not trap.
 * rvmm: exit status 0.
 */
#include "common.inc"
#include "teach.inc"

#define SATP_SV39   8
#define PTE_RWX     0xcf            /* dirty, accessed, executable, writable, readable, valid */
#define PTE_RW      0xc7
#define UNMAPPED    0x50000000
#define NO_TRAP     -1

/* Print what the handler has seen. */
.macro tell what:vararg
    say     \what
    say     ": cause "
    say_hex s9
    say     ", sepc "
    say_hex s10
    say     ", stval "
    say_hex s11
    end_line
.endm

main:
    lla     tp, line
    /* Pages of a gigabyte, each at its own address: devices, and RAM. */
    lla     t0, root
    li      t1, PTE_RW
    sd      t1, (8 * 0)(t0)
    li      t1, (RAM >> 2) | PTE_RWX
    sd      t1, (8 * 2)(t0)
    srli    t0, t0, 12
    li      t1, SATP_SV39 << 60
    or      t0, t0, t1
    csrw    satp, t0
    sfence.vma
    on_trap step

    csrr    t0, 0x680               /* 4 bytes. hgatp belongs to the hypervisor */
    tell    "illegal instruction"

    li      s0, UNMAPPED
    ld      s1, 0(s0)               /* 2 bytes: a compressed instruction */
    tell    "load from nowhere"

    li      s9, NO_TRAP
    li      t0, NOWHERE
    ld      s8, 0(t0)
    li      t0, NO_TRAP
    bne     s9, t0, fail
    say     "guest-physical nowhere: no trap, the value is "
    say_hex s8
    end_line
    j       power_off

/* The trap handler: writes down what the hart tells, and goes on behind the instruction. */
    .balign 4
step:
    csrr    s9, scause
    csrr    s10, sepc
    csrr    s11, stval
    /* An instruction whose lowest two bits are not both set has 2 bytes. */
    lhu     t5, 0(s10)
    andi    t5, t5, 3
    addi    t5, t5, -3
    addi    t6, s10, 4
    beqz    t5, 1f
    addi    t6, s10, 2
1:  csrw    sepc, t6
    sret

    .bss
    .balign 4096
root:
    .space  4096
line:
    .space  LINE_SIZE
