/*
 * Answers one line read by DBCN, then one line read from the UART. The host sends the first line
 * after `ready`, the second after `uart ready`.
 * rvmm: exit status 0.
 */
#include "common.inc"

#define LINE_MAX    256

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)

    print   "ready\n"
    lla     s2, line
    addi    s3, s2, LINE_MAX - 1
1:  li      a0, 1
    mv      a1, s2
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_READ
    bnez    a0, fail
    beqz    a1, 1b                  /* nothing yet */
    lbu     t0, 0(s2)
    addi    s2, s2, 1
    li      t1, '\n'
    beq     t0, t1, 2f
    bltu    s2, s3, 1b
2:  sb      zero, 0(s2)
    print   "got "
    lla     a0, line
    call    print_str

    uart_print "uart ready\n"
    lla     s2, line
    addi    s3, s2, LINE_MAX - 1
    li      s4, UART
3:  lbu     t0, UART_LSR(s4)
    andi    t0, t0, LSR_DR
    beqz    t0, 3b                  /* nothing yet */
    lbu     t0, UART_RBR(s4)
    sb      t0, 0(s2)
    addi    s2, s2, 1
    li      t1, '\n'
    beq     t0, t1, 4f
    bltu    s2, s3, 3b
4:  sb      zero, 0(s2)
    uart_print "uart got "
    lla     a0, line
    call    uart_str

    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

    .bss
line:
    .space  LINE_MAX
