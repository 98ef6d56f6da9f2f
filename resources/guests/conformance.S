/*
 * Asks the SBI everything that its specification (RISC-V SBI 2.0) answers, extension by extension, and compares.
 *
 * One line a check, `EXT name: ok` or `EXT name: got ERROR/VALUE wanted ERROR/VALUE`, where `*` is any value and `a|b` either
 * error. Where the host's kernel is known to answer otherwise than the specification, and does: `EXT name: known, got ...`,
 * which is counted apart and is no failure. Then the sums: `EXT: N checks, M failed, K known` and
 * `conformance: N checks, M failed, H harts, K known`.
 *
 * Runs on harts 0 to N-1 for N up to 32, started on any of them; time is taken to run at 10 MHz, as on QEMU's machines.
 * rvmm: exit status 0, or 121 when a check failed; the lines in tests/conformance.rs.
 *
 *   conformance-check.inc    the checks' records, the verdict, the sums
 *   conformance-harts.inc    the code of the other harts, and waiting for them
 *   conformance-base.inc     BASE, TIME, SRST
 *   conformance-remote.inc   IPI, RFENCE
 *   conformance-hsm.inc      HSM
 *   conformance-memory.inc   DBCN, STA: what takes an address; the end of RAM
 *   conformance-optional.inc PMU, SUSP, FWFT, where they are
 */
#include "common.inc"
#include "conformance-check.inc"
#include "conformance-harts.inc"
#include "conformance-base.inc"
#include "conformance-remote.inc"
#include "conformance-hsm.inc"
#include "conformance-memory.inc"
#include "conformance-optional.inc"

/* For all that follows: s0 = this hart, s1 = device tree, s2 = number of harts, s8 = end of RAM (0 when not told). */
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
 * count_harts(): the lowest id that HSM does not know. Linux 6.12 calls such a hart started, against the specification (the
 * checks of HSM tell so), which none but this one is yet.
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
