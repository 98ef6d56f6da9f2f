/*
 * The UART's wire through the APLIC and the IMSIC, once as an edge and once as a level. The
 * transmitter's interrupt is enabled (the wire rises) and acknowledged (it falls). Prints which
 * identity came each time, 0 for none.
 * rvmm: exit status 0, on a host with AIA.
 */
#include "common.inc"

#define IER_THRI        0x02

#define APLIC           0x0d000000
#define DOMAINCFG       0x0000
#define DOMAINCFG_IE    0x100
#define SOURCECFG       0x0028          /* of source 10 */
#define SOURCECFG_EDGE  4               /* rising */
#define SOURCECFG_LEVEL 6               /* high */
#define SETIENUM        0x1edc
#define SETIPNUM_LE     0x2000
#define TARGET          0x3028          /* of source 10 */
#define SOURCE          10
#define IDENTITY        3

#define SISELECT        0x150
#define SIREG           0x151
#define STOPEI          0x15c
#define EIDELIVERY      0x70
#define EIE0            0xc0

/* Write a register of the IMSIC. Clobbers t0. */
.macro imsic register, value
    li      t0, \register
    csrw    SISELECT, t0
    li      t0, \value
    csrw    SIREG, t0
.endm

/* Write a register of the APLIC. Clobbers t0, t1. */
.macro aplic register, value
    li      t0, APLIC + \register
    li      t1, \value
    sw      t1, 0(t0)
.endm

/* Print a name and the identity that comes. */
.macro report name:vararg
    print   \name
    call    next_identity
    call    print_dec
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    li      s2, UART
    sb      zero, UART_IER(s2)

    imsic   EIDELIVERY, 1
    imsic   EIE0, (1 << IDENTITY)
    aplic   DOMAINCFG, DOMAINCFG_IE
    aplic   TARGET, IDENTITY
    aplic   SOURCECFG, SOURCECFG_EDGE
    aplic   SETIENUM, SOURCE

    call    raise_wire
    report  "edge: rise="
    report  " then="
    call    lower_wire
    report  " fall="
    call    raise_wire
    report  " rise="
    call    lower_wire
    print   "\n"

    aplic   SOURCECFG, SOURCECFG_LEVEL
    aplic   SETIENUM, SOURCE
    call    raise_wire
    report  "level: rise="
    report  " then="
    /* Linux ends a level interrupt so. The level is still high: the interrupt comes again. */
    aplic   SETIPNUM_LE, SOURCE
    report  " retrigger="
    call    lower_wire
    aplic   SETIPNUM_LE, SOURCE         /* low: nothing to come */
    report  " fall="
    call    raise_wire
    report  " rise="
    call    lower_wire
    print   "\n"

    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

/* The empty transmitter interrupts as soon as it is enabled. */
raise_wire:
    li      t0, IER_THRI
    sb      t0, UART_IER(s2)
    ret

/* Reading IIR acknowledges the interrupt. */
lower_wire:
    lbu     t0, UART_IIR(s2)
    sb      zero, UART_IER(s2)
    ret

/* next_identity() -> a0: claims the interrupt that is pending or comes soon; 0 if none does */
next_identity:
    li      t0, 100000
1:  csrrw   a0, STOPEI, zero
    bnez    a0, 2f
    addi    t0, t0, -1
    bnez    t0, 1b
2:  srli    a0, a0, 16
    ret
