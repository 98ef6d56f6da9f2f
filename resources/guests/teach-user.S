/*
 * Trap and emulate (docs/guests/teach-user.md): a user program in VU-mode, and its kernel in
 * VS-mode.
 * rvmm: exit status 0.
 */
#include "common.inc"
#include "teach.inc"

#define SATP_SV39   8
#define PTE_TABLE   0x01
#define PTE_RWX     0xcf            /* dirty, accessed, executable, writable, readable, valid */
#define PTE_RW      0xc7
#define PTE_USER_RX 0x5b            /* accessed, user, executable, readable, valid */
#define SSTATUS_SPP 0x100
#define USER        0x40000000      /* the virtual address of the user's page */

#define CAUSE_ECALL_U       8
#define CAUSE_STORE_PAGE    15

/* System calls: the number in a7, arguments from a0 on, the result in a0. */
#define SYS_COUNT   0               /* the number of system calls so far */
#define SYS_WRITE   1               /* print a1 bytes at a0 */
#define SYS_UART    2               /* store the byte in a0 to the UART */
#define SYS_EXIT    3

/* ---- the kernel ---- */
main:
    lla     tp, line
    lla     t0, root
    li      t1, PTE_RW              /* devices, for the kernel only */
    sd      t1, (8 * 0)(t0)
    li      t1, (RAM >> 2) | PTE_RWX
    sd      t1, (8 * 2)(t0)
    lla     t1, middle
    lla     t2, last
    lla     t3, user
    srli    t4, t1, 2
    ori     t4, t4, PTE_TABLE
    sd      t4, (8 * 1)(t0)         /* USER: three levels, to one page */
    srli    t4, t2, 2
    ori     t4, t4, PTE_TABLE
    sd      t4, 0(t1)
    srli    t4, t3, 2
    ori     t4, t4, PTE_USER_RX
    sd      t4, 0(t2)
    srli    t0, t0, 12
    li      t1, SATP_SV39 << 60
    or      t0, t0, t1
    csrw    satp, t0
    sfence.vma

    on_trap trap
    lla     t0, kernel_frame
    csrw    sscratch, t0
    li      t0, SSTATUS_SPP         /* sret goes to user mode */
    csrc    sstatus, t0
    li      t0, USER
    csrw    sepc, t0
    sret

/* A trap of the user. sscratch has the kernel's tp; it gets the user's. */
    .balign 4
trap:
    csrrw   tp, sscratch, tp
    sd      ra, LINE_SIZE(tp)       /* the user has no other register that the kernel changes */
    csrr    s2, scause
    csrr    s3, sepc
    addi    s3, s3, 4
    csrw    sepc, s3
    li      t0, CAUSE_ECALL_U
    beq     s2, t0, system_call
    li      t0, CAUSE_STORE_PAGE
    bne     s2, t0, unexpected_trap
    csrr    s3, stval
    say     "kernel: refused a store of the user to "
    say_hex s3
    end_line
back:
    ld      ra, LINE_SIZE(tp)
    csrrw   tp, sscratch, tp
    sret

system_call:
    addi    s4, s4, 1
    li      t0, SYS_WRITE
    beq     a7, t0, write
    li      t0, SYS_UART
    beq     a7, t0, uart
    li      t0, SYS_EXIT
    beq     a7, t0, exit
    mv      a0, s4
    j       back

/* The user's address means nothing to the SBI: it takes guest-physical ones. */
write:
    li      t0, USER
    sub     a0, a0, t0
    lla     t0, user
    add     a0, a0, t0
    call    print_bytes
    j       back

uart:
    li      t0, UART
    sb      a0, UART_THR(t0)
    j       back

exit:
    say     "kernel: the user has made "
    say_hex s4
    say     " system calls"
    end_line
    j       power_off

/* ---- the user, on a page of its own ---- */
    .balign 4096
user:
    li      s0, 1000
1:  li      a7, SYS_COUNT
    ecall
    addi    s0, s0, -1
    bnez    s0, 1b

    lla     a0, user_text
    lla     a1, user_text_end
    sub     a1, a1, a0
    li      a7, SYS_WRITE
    ecall
    li      a0, '!'
    li      a7, SYS_UART
    ecall
    li      a0, '\n'
    li      a7, SYS_UART
    ecall
    li      t0, UART
    .option push
    .option norvc                   /* 4 bytes, as the kernel assumes */
    sb      a0, UART_THR(t0)
    .option pop
    li      a7, SYS_EXIT
    ecall
user_text:
    .ascii  "hello from VU-mode"
user_text_end:
    .balign 4096

    .bss
    .balign 4096
root:
    .space  4096
middle:
    .space  4096
last:
    .space  4096
line:
kernel_frame:
    .space  LINE_SIZE               /* the line */
    .space  8                       /* the user's ra */
