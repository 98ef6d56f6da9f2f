/*
 * Reads lines through DBCN, prints each as `life: LINE`, and does what its first letter says:
 *
 *   c  cold reboot    t  reboot by sifive_test      x  end with code 42
 *   w  warm reboot    p  power off by sifive_test   y  end with code 300
 *   a  change registers of a machine with an AIA, then cold reboot; l  the same with a PLIC
 *   k  check that the registers are as after a reset, and print for each `NAME: ok`, or its value
 *      (K on a machine with a PLIC)
 *   n  nothing
 */
#include "common.inc"

#define TEST            0x00100000
#define TEST_PASS       0x5555
#define TEST_RESET      0x7777
#define TEST_FAIL       0x3333

#define RTC             0x00101000
#define RTC_ALARM_LOW   0x08
#define RTC_ALARM_HIGH  0x0c
#define RTC_IRQ_ENABLED 0x10
#define RTC_ALARM_STATUS 0x18

#define PLIC            0x0c000000
#define PLIC_PRIORITY   (PLIC + 4 * SOURCE)
#define PLIC_PENDING    (PLIC + 0x1000)
#define PLIC_ENABLE     (PLIC + 0x2080)         /* of context 1 */
#define PLIC_THRESHOLD  (PLIC + 0x201000)

#define APLIC           0x0d000000
#define DOMAINCFG       (APLIC + 0x0000)
#define DOMAINCFG_IE    0x100
#define DOMAINCFG_RESET 0x80000004              /* the fixed bits: an APLIC that sends MSIs */
#define SOURCECFG       (APLIC + 4 * SOURCE)
#define SOURCECFG_LEVEL 6
#define SETIE           (APLIC + 0x1e00)
#define SETIENUM        (APLIC + 0x1edc)
#define TARGET          (APLIC + 0x3000 + 4 * SOURCE)

#define SOURCE          10                      /* the UART's */
#define IDENTITY        3

#define SISELECT        0x150
#define SIREG           0x151
#define EIDELIVERY      0x70
#define EITHRESHOLD     0x72
#define EIP0            0x80
#define EIE0            0xc0

#define SIP_SSIP        0x02
#define SSTATUS_FS      0x6000
#define SBI_TIME        0x54494d45
#define SBI_IPI         0x735049
#define TICKS_SOON      200000                  /* 20 ms of QEMU's 10 MHz */

#define DIRT            0x8700000               /* offset in RAM that no loader fills */

/* Store a word. Clobbers t0, t1. */
.macro store width, address, value
    li      t0, \address
    li      t1, \value
    s\width t1, 0(t0)
.endm

/* Compare what \load, instructions, leaves in a1 with \value. */
.macro expect name, value, load:vararg
    \load
    li      a2, \value
    lla     a0, 97f
    call    judge
    .pushsection .rodata
97: .asciz  "\name"
    .popsection
.endm

.macro load width, address
    li      a1, \address
    l\width a1, 0(a1)
.endm

.macro imsic register
    li      a1, \register
    csrw    SISELECT, a1
    csrr    a1, SIREG
.endm

.macro set_imsic register, value
    li      t0, \register
    csrw    SISELECT, t0
    li      t0, \value
    csrw    SIREG, t0
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
next:
    call    read_line
    print   "life: "
    lla     a0, line
    call    print_str
    print   "\n"
    lbu     t0, line
    li      t1, 'n'
    beq     t0, t1, next
    li      t1, 'c'
    beq     t0, t1, cold
    li      t1, 'w'
    beq     t0, t1, warm
    li      t1, 't'
    beq     t0, t1, test_reset
    li      t1, 'p'
    beq     t0, t1, test_pass
    li      t1, 'x'
    beq     t0, t1, code_42
    li      t1, 'y'
    beq     t0, t1, code_300
    li      t1, 'a'
    beq     t0, t1, dirty_aia
    li      t1, 'l'
    beq     t0, t1, dirty_plic
    li      s3, 1
    li      t1, 'k'
    beq     t0, t1, check
    li      s3, 0
    li      t1, 'K'
    beq     t0, t1, check
    j       fail

cold:
    system_reset SRST_COLD_REBOOT, SRST_NO_REASON
warm:
    system_reset 2, SRST_NO_REASON
test_reset:
    store   w, TEST, TEST_RESET
    j       fail
test_pass:
    store   w, TEST, TEST_PASS
    j       fail
code_42:
    store   w, TEST, (42 << 16) | TEST_FAIL
    j       fail
code_300:
    store   w, TEST, (300 << 16) | TEST_FAIL
    j       fail

dirty_aia:
    store   w, DOMAINCFG, DOMAINCFG_IE
    store   w, SOURCECFG, SOURCECFG_LEVEL
    store   w, TARGET, IDENTITY
    store   w, SETIENUM, SOURCE
    set_imsic EIDELIVERY, 1
    set_imsic EITHRESHOLD, 9
    set_imsic EIE0, 0xfe
    set_imsic EIP0, 0x10
    call    dirty_rest
    j       cold

dirty_plic:
    store   w, PLIC_PRIORITY, 7
    store   w, PLIC_ENABLE, 1 << SOURCE
    store   w, PLIC_THRESHOLD, 3
    call    dirty_rest
    j       cold

/* What every machine has. The UART's wire is left high. */
dirty_rest:
    store   b, UART + UART_LCR, 0x1b
    store   b, UART + UART_MCR, 0x0b
    store   b, UART + UART_SCR, 0x5a
    store   b, UART + UART_IER, 0x0f
    store   w, RTC + RTC_IRQ_ENABLED, 1
    store   w, RTC + RTC_ALARM_HIGH, 0x7fffffff
    store   w, RTC + RTC_ALARM_LOW, 0
    store   d, RAM + DIRT, 0x5aa5
    li      t0, 0x1234
    csrw    sscratch, t0
    li      t0, SSTATUS_FS
    csrs    sstatus, t0
    li      t0, 0x5aa5
    fmv.d.x f9, t0
    csrsi   sip, SIP_SSIP
    rdtime  a0
    li      t0, TICKS_SOON
    add     a0, a0, t0
    sbi     SBI_TIME, 0
    ret

check:
    expect  sscratch, 0, csrr a1, sscratch
    expect  scounteren, 7, csrr a1, scounteren
    expect  satp, 0, csrr a1, satp
    expect  sip, 0, csrr a1, sip
    expect  ram, 0, load d, RAM + DIRT
    expect  uart-lcr, 0, load bu, UART + UART_LCR
    expect  uart-mcr, 0, load bu, UART + UART_MCR
    expect  uart-scr, 0, load bu, UART + UART_SCR
    expect  uart-ier, 0, load bu, UART + UART_IER
    expect  rtc-irq, 0, load w, RTC + RTC_IRQ_ENABLED
    expect  rtc-alarm, 0, load w, RTC + RTC_ALARM_STATUS
    li      t0, SSTATUS_FS
    csrs    sstatus, t0
    expect  f9, 0, fmv.x.d a1, f9
    beqz    s3, 1f
    expect  aplic-domaincfg, DOMAINCFG_RESET, load wu, DOMAINCFG
    expect  aplic-sourcecfg, 0, load w, SOURCECFG
    expect  aplic-ie, 0, load w, SETIE
    expect  imsic-eidelivery, 0, imsic EIDELIVERY
    expect  imsic-eithreshold, 0, imsic EITHRESHOLD
    expect  imsic-eie, 0, imsic EIE0
    expect  imsic-eip, 0, imsic EIP0
    j       2f
1:  expect  plic-priority, 0, load w, PLIC_PRIORITY
    expect  plic-enable, 0, load w, PLIC_ENABLE
    expect  plic-threshold, 0, load w, PLIC_THRESHOLD
    expect  plic-pending, 0, load w, PLIC_PENDING
    /* the timer that the last life set must not fire in this one */
2:  rdtime  s4
3:  rdtime  t0
    sub     t0, t0, s4
    li      t1, 2 * TICKS_SOON
    bltu    t0, t1, 3b
    expect  timer, 0, csrr a1, sip
    j       next

/* judge(a0 = name, a1 = what is there, a2 = what should be) */
judge:
    addi    sp, sp, -32
    sd      ra, 24(sp)
    sd      a1, 16(sp)
    sd      a2, 8(sp)
    call    print_str
    print   ": "
    ld      a1, 16(sp)
    ld      a2, 8(sp)
    beq     a1, a2, 1f
    mv      a0, a1
    call    print_hex
    print   "\n"
    j       2f
1:  print   "ok\n"
2:  ld      ra, 24(sp)
    addi    sp, sp, 32
    ret

/* read_line(): up to 63 bytes and a NUL in `line` */
read_line:
    lla     t3, line
1:  li      a0, 1
    mv      a1, t3
    li      a2, 0
    sbi     SBI_DBCN, SBI_DBCN_READ
    bnez    a0, fail
    beqz    a1, 1b
    lbu     t0, 0(t3)
    li      t1, '\n'
    beq     t0, t1, 2f
    addi    t3, t3, 1
    lla     t1, line + 63
    bltu    t3, t1, 1b
2:  sb      zero, 0(t3)
    ret

    .bss
line:
    .zero   64
