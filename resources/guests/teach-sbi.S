/*
 * The first teaching guest (docs/guests/teach-sbi.md): one SBI call, a check of its result, and the
 * end.
 * rvmm: exit status 0.
 */
#include "header.inc"

    .section .rodata
text:
    .ascii  "hello from VS-mode\n"
    .set    TEXT_SIZE, . - text

    .text

    /* VS-mode, paging off. a0 is the hart's number, a1 the address of the device tree. */
guest_entry:
    bnez    a0, wrong               /* the boot hart is hart 0 */

    li      a0, TEXT_SIZE           /* a0: length */
    lla     a1, text                /* a1, a2: address, low and high half */
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_WRITE
    bnez    a0, wrong               /* a0: the error */
    li      t0, TEXT_SIZE
    bne     a1, t0, wrong           /* a1: how many bytes were written */

    system_reset SRST_SHUTDOWN, SRST_NO_REASON

wrong:
    system_reset SRST_SHUTDOWN, SRST_FAILURE
