/*
 * Calls all SBI functions whose answer the specification (RISC-V SBI 2.0) defines, extension by
 * extension, and compares the answers.
 *
 * Prints one line for each check, `EXT name: ok` or `EXT name: got ERROR/VALUE wanted ERROR/VALUE`,
 * where `*` is any value and `a|b` either error. If the host's kernel is known to deviate from the
 * specification, and does, the line is `EXT name: known, got ...`. Such checks count separately,
 * and are no failures. Then come the sums: `EXT: N checks, M failed, K known` and `conformance: N
 * checks, M failed, H harts, K known`.
 *
 * Runs on harts 0 to N-1 for N up to 32, and can be started on any of them. Assumes that time runs
 * at 10 MHz, as on QEMU's machines.
 * rvmm: exit status 0, or 121 if a check failed; the lines in tests/every_host/conformance.rs.
 *
 *   conformance-check.inc    the records of checks, the verdict, the sums
 *   conformance-harts.inc    the code of the other harts, and how to wait for them
 *   conformance-base.inc     BASE, TIME, SRST
 *   conformance-remote.inc   IPI, RFENCE
 *   conformance-hsm.inc      HSM
 *   conformance-memory.inc   DBCN, STA: functions with an address; the end of RAM
 *   conformance-optional.inc PMU, SUSP, FWFT, where they exist
 */
#include "common.inc"
#include "conformance-check.inc"
#include "conformance-harts.inc"
#include "conformance-base.inc"
#include "conformance-remote.inc"
#include "conformance-hsm.inc"
#include "conformance-memory.inc"
#include "conformance-optional.inc"

/*
 * For everything below: s0 = this hart, s1 = device tree, s2 = number of harts, s8 = end of RAM (0
 * if unknown).
 */
main:
    call    check_registers
    call    count_harts
    mv      s2, a0
    call    ram_end
    mv      s8, a0
    li      t0, MAX_HARTS
    bgtu    s2, t0, too_many
    call    check_base
    call    check_time
    call    check_hsm_at_rest
    call    check_hsm_start
    call    check_ipi
    call    check_rfence
    call    check_hsm_suspend
    call    check_hsm_stop
    call    check_srst
    call    check_dbcn
    call    check_sta
    call    check_pmu
    call    check_susp
    call    check_fwft
    call    print_sums
    bnez    a0, fail
    j       power_off

too_many:
    print   "conformance: too many harts\n"
    j       fail

/*
 * count_harts(): the lowest ID that HSM does not know. Linux 6.12 reports such a hart as started,
 * against the specification (HSM's checks show this). Only this hart has been started yet.
 */
count_harts:
    li      t0, 0
1:  beq     t0, s0, 2f
    mv      a0, t0
    sbi     SBI_HSM, HSM_STATUS
    bnez    a0, 3f
    li      t1, HART_STOPPED
    bne     a1, t1, 3f
2:  addi    t0, t0, 1
    li      t1, MAX_HARTS
    bleu    t0, t1, 1b
3:  mv      a0, t0
    ret
