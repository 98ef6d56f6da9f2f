/*
 * Writes 100 MiB through DBCN as fast as it can. If the console accepts nothing for three seconds,
 * it reports a failure.
 * rvmm: exit status 0; 121 if nobody reads.
 */
#include "common.inc"

#define BLOCKS      25600
#define BLOCK_LEN   4096
#define PATIENCE    30000000        /* ticks: 3 s of QEMU's 10 MHz */

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)

    li      s2, BLOCKS
1:  lla     s3, block
    li      s4, BLOCK_LEN
    rdtime  s5                      /* when bytes were taken last */
2:  mv      a0, s4
    mv      a1, s3
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_WRITE
    bnez    a0, fail
    beqz    a1, 3f
    add     s3, s3, a1
    sub     s4, s4, a1
    rdtime  s5
    bnez    s4, 2b
    addi    s2, s2, -1
    bnez    s2, 1b

    print   "torrent: done\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

3:  rdtime  t0
    sub     t0, t0, s5
    li      t1, PATIENCE
    bltu    t0, t1, 2b
    j       fail

    .section .rodata
    .balign 8
block:
    .rept   BLOCK_LEN / 64
    .ascii  "torrent .......................................................\n"
    .endr
    .if     . - block - BLOCK_LEN
    .error  "a block must have BLOCK_LEN bytes"
    .endif
