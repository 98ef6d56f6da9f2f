/*
 * Reads and writes a CSR that no hart has. The host's M-mode firmware takes this trap first. It
 * must pass it on to KVM as an illegal instruction, and KVM to the guest.
 * rvmm: exit status 0. If the firmware fails to pass it on, the guest continues at KVM's own trap
 * vector, which is not an address of the guest, and the status is 122. On an emulated host (QEMU
 * 10.0 with OpenSBI 1.6) that always happens: mstatus.MPV is still set after OpenSBI has prepared
 * the return to the host's kernel, and the return goes to the guest.
 */
#include "common.inc"

#define CSR_NONE    0x5ff           /* supervisor, custom: not implemented */

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)

    print   "illegal: now\n"
    li      s11, -1
    on_trap skip
    csrr    s2, CSR_NONE
    on_trap unexpected_trap
    print   "csr read: trap cause="
    mv      a0, s11
    call    print_dec
    print   "\n"

    li      s11, -1
    on_trap skip
    csrw    CSR_NONE, s2
    on_trap unexpected_trap
    print   "csr write: trap cause="
    mv      a0, s11
    call    print_dec
    print   "\n"

    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret
