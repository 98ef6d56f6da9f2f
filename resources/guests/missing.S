/*
 * Accesses things that do not exist, and goes on: addresses without a device, unknown SBI calls, an
 * unknown CSR.
 * rvmm: exit status 0, the lines in tests/every_host/guests.rs.
 */
#include "common.inc"

#define CSR_HSTATUS 0x600

/* Load by \insn from a0's address and print ` \insn=<hex>`. */
.macro loaded insn, base, offset
    li      t0, \base
    \insn   s2, \offset(t0)
    print   " \insn="
    mv      a0, s2
    call    print_hex
.endm

/* Call function \fid of extension \ext and print `\name: <error>`. */
.macro unknown name, ext, fid
    print   "\name: "
    li      a0, 0
    li      a1, 0
    li      a2, 0
    sbi     \ext, \fid
    call    print_dec
    print   "\n"
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)

    /*
     * Every width and both kinds of load. The signed ones are not printed: Linux 6.12 does not
     * sign-extend an MMIO load of less than 8 bytes; newer kernels do.
     */
    print   "nowhere:"
    loaded  lbu, NOWHERE, 0
    loaded  lhu, NOWHERE, 2
    loaded  lwu, NOWHERE, 4
    loaded  ld,  NOWHERE, 8
    print   "\n"
    li      t0, NOWHERE
    lb      t1, 1(t0)
    lh      t1, 2(t0)
    lw      t1, 4(t0)
    mv      a4, t0
    c.lw    a5, 4(a4)
    li      t1, -1
    sb      t1, 3(t0)
    sh      t1, 2(t0)
    sw      t1, 4(t0)
    sd      t1, 8(t0)
    print   "nowhere: stored\n"

    /*
     * The UART, by accesses that no driver makes. Writes zeros, and not to THR, so that nothing is
     * printed.
     */
    li      s3, UART
    li      t1, 0x5a
    sb      t1, UART_SCR(s3)
    print   "uart: scratch="
    lbu     a0, UART_SCR(s3)
    call    print_hex
    print   "\n"
    lhu     t1, 2(s3)
    lhu     t1, 6(s3)
    lwu     t1, 4(s3)
    ld      t1, 0(s3)
    ld      t1, 8(s3)
    ld      t1, 0x100(s3)
    lbu     t1, 0x7ff(s3)
    sh      zero, 2(s3)
    sh      zero, 6(s3)
    sw      zero, 4(s3)
    sd      zero, 8(s3)
    sd      zero, 0x100(s3)
    sb      zero, 0x7ff(s3)
    print   "uart: odd accesses done\n"

    unknown "sbi unknown extension",    0x0badbeef, 0
    unknown "sbi experimental",         0x08000001, 0
    unknown "sbi vendor",               0x09000001, 0
    unknown "sbi unknown function",     SBI_DBCN, 9

    /* Asking whether the experimental extension exists is legal; the answer is no. */
    li      a0, 0x08000001
    li      a1, 0
    sbi     SBI_BASE, SBI_BASE_PROBE
    mv      s2, a1
    beqz    a0, 1f
    li      s2, 0
1:  print   "sbi probe experimental: "
    mv      a0, s2
    call    print_dec
    print   "\n"

    /*
     * A hypervisor CSR, which the guest's hart does not have: KVM answers like such a hart. The
     * handler goes on after it. (illegal.S has instructions that the host's harts do not know
     * either.)
     */
    li      s11, -1
    on_trap skip
    csrr    s2, CSR_HSTATUS
    on_trap unexpected_trap
    print   "csr read: trap cause="
    mv      a0, s11
    call    print_dec
    print   "\n"

    li      s11, -1
    on_trap skip
    csrw    CSR_HSTATUS, s2
    on_trap unexpected_trap
    print   "csr write: trap cause="
    mv      a0, s11
    call    print_dec
    print   "\n"

    print   "missing: alive\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret
