/*
 * Measures the cost of an exit, out of the guest and back. For each kind it prints `exits: KIND
 * COUNT TICKS` through the UART, with TICKS of the guest's timer, or `exits: KIND refused`.
 *
 *   base    an SBI call that KVM itself serves: BASE, get_spec_version
 *   dbcn    an SBI call that userspace serves: DBCN, a write of no bytes
 *   read    a load from the UART's scratch register
 *   write   a store to it
 *
 * rvmm: exit status 0.
 */
#include "common.inc"

#define COUNT       10000
#define WARM_UP     100

/* Time \what, a routine, as "name". */
.macro time name, what
    uart_print "exits: \name "
    lla     a0, \what
    call    time_it
    uart_print "\n"
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    time    base, base
    time    dbcn, dbcn
    time    read, read
    time    write, write
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/* time_it(a0 = routine that takes its count in s4, and leaves 0 in a0 if it was served) */
time_it:
    addi    sp, sp, -32
    sd      ra, 24(sp)
    sd      s2, 16(sp)
    sd      s3, 8(sp)
    mv      s2, a0
    li      s4, WARM_UP
    jalr    s2
    bnez    a0, 1f
    li      s4, COUNT
    rdtime  s3
    jalr    s2
    rdtime  t0
    sub     s3, t0, s3
    li      a0, COUNT
    call    uart_dec
    uart_print " "
    mv      a0, s3
    call    uart_dec
    j       2f
1:  uart_print "refused"
2:  ld      s3, 8(sp)
    ld      s2, 16(sp)
    ld      ra, 24(sp)
    addi    sp, sp, 32
    ret

base:
1:  sbi     SBI_BASE, 0
    addi    s4, s4, -1
    bgtz    s4, 1b
    ret

dbcn:
1:  li      a0, 0
    li      a1, RAM
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_WRITE
    bnez    a0, 2f
    addi    s4, s4, -1
    bgtz    s4, 1b
2:  ret

read:
    li      t0, UART
1:  lbu     t1, UART_SCR(t0)
    addi    s4, s4, -1
    bgtz    s4, 1b
    li      a0, 0
    ret

write:
    li      t0, UART
1:  sb      t0, UART_SCR(t0)
    addi    s4, s4, -1
    bgtz    s4, 1b
    li      a0, 0
    ret
