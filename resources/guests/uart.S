/*
 * Measures the UART's receive FIFO in loopback, like a driver that detects the chip, and tests the
 * modem lines, a break and the trigger levels.
 * rvmm: exit status 0, the lines in tests/every_host/guests.rs.
 */
#include "common.inc"

#define IER_RDI         0x01            /* received data */
#define IER_ALL         0x0f
#define IIR_ID          0x0f
#define IIR_RDI         0x04            /* data at the trigger level */
#define FCR_ENABLE      0x01
#define FCR_CLEAR_RX    0x02
#define FCR_TRIGGER_1   0x00
#define FCR_TRIGGER_4   0x40
#define FCR_TRIGGER_8   0x80
#define FCR_TRIGGER_14  0xc0
#define LCR_WORD_8      0x03
#define LCR_BREAK       0x40
#define MCR_DTR         0x01
#define MCR_RTS         0x02
#define MCR_OUT1        0x04
#define MCR_OUT2        0x08
#define MCR_LOOP        0x10
#define LSR_OE          0x02            /* a byte was lost */

#define ENOUGH          64              /* more bytes than the FIFO holds */

/* Write a register of the UART. Clobbers t0. */
.macro put register, value
    li      t0, \value
    sb      t0, \register(s4)
.endm

/* Print a name and a register of the UART. */
.macro show register, name:vararg
    print   \name
    lbu     a0, \register(s4)
    call    print_hex
.endm

/* Print a name and the number in \register. */
.macro report register, name:vararg
    print   \name
    mv      a0, \register
    call    print_dec
.endm

/* Overrun the receiver with \fcr, and print what it kept and lost. */
.macro measured fcr, name:vararg
    put     UART_FCR, \fcr
    print   \name
    call    measure
.endm

/* Print which byte with \fcr makes data available, and how IIR names those before. */
.macro triggered fcr, name:vararg
    put     UART_FCR, \fcr
    print   \name
    call    fill
.endm

/* Print MSR twice with \mcr: changes are reported once. */
.macro lines mcr, name:vararg
    put     UART_MCR, \mcr
    show    UART_MSR, \name
    show    UART_MSR, " "
    print   "\n"
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    li      s4, UART
    put     UART_IER, 0
    put     UART_LCR, LCR_WORD_8
    put     UART_MCR, MCR_LOOP

    measured 0, "off:"
    measured FCR_ENABLE | FCR_CLEAR_RX, "on:"

    put     UART_IER, IER_RDI
    triggered 0, "trigger off:"
    triggered FCR_ENABLE | FCR_CLEAR_RX | FCR_TRIGGER_1, "trigger 1:"
    triggered FCR_ENABLE | FCR_CLEAR_RX | FCR_TRIGGER_4, "trigger 4:"
    triggered FCR_ENABLE | FCR_CLEAR_RX | FCR_TRIGGER_8, "trigger 8:"
    triggered FCR_ENABLE | FCR_CLEAR_RX | FCR_TRIGGER_14, "trigger 14:"

    put     UART_FCR, FCR_ENABLE | FCR_CLEAR_RX
    show    UART_LSR, "flushed: lsr="
    show    UART_IIR, " iir="
    print   "\n"

    lbu     t0, UART_MSR(s4)
    lines   MCR_LOOP | MCR_DTR, "dtr: "
    lines   MCR_LOOP | MCR_RTS, "rts: "
    lines   MCR_LOOP | MCR_OUT1, "out1: "
    lines   MCR_LOOP | MCR_OUT2, "out2: "
    lines   MCR_LOOP, "none: "

    call    break_behind_a_byte
    call    by_priority

    put     UART_MCR, 0
    lbu     t0, UART_MSR(s4)
    show    UART_MSR, "no loop: msr="
    print   "\n"
    uart_print "uart: done\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/*
 * Print the first byte that is lost, LSR's errors after that, the number of bytes kept, and the
 * first and the last of them.
 */
measure:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    li      s2, 0                   /* bytes sent */
    li      s3, ENOUGH
1:  addi    s2, s2, 1
    sb      s2, UART_THR(s4)
    lbu     t0, UART_LSR(s4)
    andi    t0, t0, LSR_OE
    bnez    t0, 2f
    bltu    s2, s3, 1b
    addi    s2, s2, 1
2:  report  s2, " overrun="
    show    UART_LSR, " lsr="

    li      s2, 0                   /* bytes kept */
    li      s5, 0                   /* the first */
    li      s6, 0                   /* the last */
3:  lbu     t0, UART_LSR(s4)
    andi    t0, t0, LSR_DR
    beqz    t0, 5f
    lbu     s6, UART_RBR(s4)
    bnez    s2, 4f
    mv      s5, s6
4:  addi    s2, s2, 1
    bltu    s2, s3, 3b
5:  report  s2, " kept="
    report  s5, " first="
    report  s6, " last="
    print   "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/*
 * Send bytes until IIR reports available data. Print IIR before: without data, and after the first
 * byte.
 */
fill:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    show    UART_IIR, " none="
    li      s2, 0                   /* bytes sent */
    li      s3, ENOUGH
1:  addi    s2, s2, 1
    sb      s2, UART_THR(s4)
    lbu     s5, UART_IIR(s4)
    li      t0, 1
    bne     s2, t0, 2f
    print   " first="
    mv      a0, s5
    call    print_hex
2:  andi    t0, s5, IIR_ID
    li      t1, IIR_RDI
    beq     t0, t1, 3f
    bltu    s2, s3, 1b
3:  report  s2, " available="
    print   "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/* A break arrives behind a byte: its error is reported when it is the next to read. */
break_behind_a_byte:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    put     UART_THR, 0x5a
    put     UART_LCR, LCR_WORD_8 | LCR_BREAK
    put     UART_LCR, LCR_WORD_8
    show    UART_LSR, "break: lsr="
    show    UART_RBR, " rbr="
    show    UART_LSR, " lsr="
    show    UART_LSR, " lsr="
    show    UART_RBR, " rbr="
    show    UART_LSR, " lsr="
    print   "\n"
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/* Every interrupt at once, each acknowledged in the order that IIR reports. */
by_priority:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    put     UART_IER, 0
    put     UART_THR, 0x5a
    put     UART_LCR, LCR_WORD_8 | LCR_BREAK
    put     UART_LCR, LCR_WORD_8
    lbu     t0, UART_RBR(s4)        /* the break is the next */
    put     UART_MCR, MCR_LOOP | MCR_RTS
    put     UART_IER, IER_ALL
    show    UART_IIR, "priority: "
    lbu     t0, UART_LSR(s4)
    show    UART_IIR, " "
    lbu     t0, UART_RBR(s4)
    show    UART_IIR, " "
    show    UART_IIR, " "
    lbu     t0, UART_MSR(s4)
    show    UART_IIR, " "
    print   "\n"
    put     UART_IER, 0
    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret
