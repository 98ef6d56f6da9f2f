/*
 * Jumps to addresses without memory, in each way a kernel can, and prints the instruction access
 * fault that the hart takes: scause, sepc and stval, and the bits of sstatus for the state before.
 * The last jump is how Linux leaves a kernel by kexec: it turns translation off, and the next fetch
 * faults.
 * rvmm: exit status 0, the lines in tests/every_host/guests.rs.
 */
#include "common.inc"

#define NO_CODE         0x04000000
#define NO_MEMORY       0x40000000  /* PCI's memory window, a gigabyte: nothing is there */

#define SSTATUS_SIE     0x002
#define SSTATUS_SPIE    0x020
#define SSTATUS_SPP     0x100

#define SATP_SV39       8
#define PTE_SUPERVISOR  0xcf        /* dirty, accessed, executable, writable, readable, valid */
#define MOVED           0x80000000  /* how much higher RAM is mapped once more */

/* Put a gigabyte's entry at \index of the root table. Clobbers t0 and t1. */
.macro map index, physical
    lla     t0, root
    li      t1, (\physical >> 2) | PTE_SUPERVISOR
    sd      t1, (8 * \index)(t0)
.endm

/* One bit of sstatus as the trap found it, in s7. */
.macro sstatus_bit text, bit
    print   "\text"
    andi    a0, s7, \bit
    snez    a0, a0
    call    print_dec
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    on_trap fault

    csrsi   sstatus, SSTATUS_SIE
    li      t0, NO_CODE
    lla     s6, 1f
    jr      t0
    .balign 4
1:  print   "supervisor:"
    call    report

    li      t0, SSTATUS_SPP
    csrc    sstatus, t0
    li      t0, SSTATUS_SPIE
    csrs    sstatus, t0
    li      t0, NO_CODE + 4
    csrw    sepc, t0
    lla     s6, 2f
    sret
    .balign 4
2:  print   "user:"
    call    report

    /* RAM at its own address, RAM at another address, and a gigabyte without memory. */
    map     2, RAM
    map     4, RAM
    map     3, NO_MEMORY
    lla     t0, root
    srli    t0, t0, 12
    li      t1, SATP_SV39 << 60
    or      t0, t0, t1
    csrw    satp, t0
    sfence.vma
    li      t0, 0xc0001000
    lla     s6, 3f
    jr      t0
    .balign 4
3:  print   "mapped:"
    call    report

    lla     s6, 5f
    lla     t0, 4f
    li      t1, MOVED
    add     t0, t0, t1
    jr      t0
    .balign 4
4:  csrw    satp, zero
    j       .                       /* the fetch of this faults */
    .balign 4
5:  li      t0, MOVED
    sub     s3, s3, t0
    sub     s4, s4, t0
    lla     t0, 4b + 4
    sub     s3, s3, t0
    sub     s4, s4, t0
    print   "translation off, relative to the jump:"
    call    report

    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

    .balign 4
fault:
    csrr    s2, scause
    csrr    s3, sepc
    csrr    s4, stval
    csrr    s7, sstatus
    jr      s6

report:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    print   " cause="
    mv      a0, s2
    call    print_dec
    print   " epc="
    mv      a0, s3
    call    print_hex
    print   " tval="
    mv      a0, s4
    call    print_hex
    sstatus_bit " spp=", SSTATUS_SPP
    sstatus_bit " spie=", SSTATUS_SPIE
    sstatus_bit " sie=", SSTATUS_SIE
    print   "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

    .bss
    .balign 4096
root:
    .space  4096
