/*
 * A timer (docs/guests/teach-timer.md): three ticks, without any exit to rvmm.
 * rvmm: exit status 0.
 */
#include "common.inc"
#include "teach.inc"

#define SBI_TIME    0x54494d45
#define STIMECMP    0x14d
#define SIE_STIE    0x20
#define SSTATUS_SIE 0x02
#define INTERVAL    100000          /* 10 ms of a timer of 10 MHz */
#define TICKS       3

main:
    lla     tp, line
    /* Has the hart stimecmp (Sstc)? If not, the read traps. */
    li      s11, 0
    on_trap skip
    csrr    t0, STIMECMP
    seqz    s5, s11
    on_trap tick

    say     "the timer is set"
    end_line
    call    set_next
    li      t0, SIE_STIE
    csrw    sie, t0
    /* wfi ends when an interrupt is pending. It is taken once sstatus.SIE is 1. */
1:  wfi
    csrsi   sstatus, SSTATUS_SIE
    csrci   sstatus, SSTATUS_SIE
    li      t0, TICKS
    blt     s2, t0, 1b

    say_digit s2
    say     " ticks, too early: "
    say_digit s3
    say     ", cause "
    say_hex s6
    end_line
    j       power_off

/* Set the next interrupt. s4 is its time. */
set_next:
    rdtime  s4
    li      t0, INTERVAL
    add     s4, s4, t0
    mv      a0, s4
    /* fall through */

/* Set the timer to a0. This also clears an interrupt that is pending. */
set_timer:
    beqz    s5, 1f
    csrw    STIMECMP, a0
    ret
1:  sbi     SBI_TIME, 0
    ret

/* The timer interrupt. s2 counts the ticks, s3 those that came too early. */
    .balign 4
tick:
    csrr    s6, scause
    rdtime  t0
    sltu    t0, t0, s4
    add     s3, s3, t0
    addi    s2, s2, 1
    li      t0, TICKS
    mv      s7, ra
    bge     s2, t0, 1f
    call    set_next
    j       2f
1:  li      a0, -1                  /* never */
    call    set_timer
2:  mv      ra, s7
    sret

    .bss
    .balign 8
line:
    .space  LINE_SIZE
