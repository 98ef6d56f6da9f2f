/*
 * Reads a disk's first sector over virtio-mmio as small kernels do: it requires QEMU's vendor ID,
 * and accepts only features among the low 32, so never VIRTIO_F_VERSION_1.
 * rvmm --transport mmio --disk ...: exit status 0, the lines in tests/every_host/guests.rs.
 */
#include "common.inc"

#define VIRTIO          0x10001000

#define MAGIC           0x000
#define VERSION         0x004
#define DEVICE_ID       0x008
#define VENDOR_ID       0x00c
#define DEVICE_FEATURES 0x010
#define DRIVER_FEATURES 0x020
#define QUEUE_SEL       0x030
#define QUEUE_NUM       0x038
#define QUEUE_READY     0x044
#define QUEUE_NOTIFY    0x050
#define STATUS          0x070
#define QUEUE_DESC      0x080
#define QUEUE_DRIVER    0x090
#define QUEUE_DEVICE    0x0a0

/* Status: 1 acknowledge, 2 driver, 8 features agreed, 4 driver ready. */
#define NEGOTIATED      11
#define READY           15

#define ENTRIES         8
#define DESC_NEXT       1
#define DESC_WRITE      2
#define BLK_IN          0
#define SECTOR          512

/* Descriptor \index. Clobbers t0 and t1. */
.macro describe index, address, length, flags
    lla     t0, descriptors + 16 * \index
    lla     t1, \address
    sd      t1, 0(t0)
    li      t1, \length
    sw      t1, 8(t0)
    li      t1, \flags
    sh      t1, 12(t0)
    li      t1, \index + 1
    sh      t1, 14(t0)
.endm

/* Where a part of the queue is. */
.macro place register, address
    lla     t1, \address
    sw      t1, \register(s2)
    srli    t1, t1, 32
    sw      t1, (\register + 4)(s2)
.endm

.macro status value
    li      t1, \value
    sw      t1, STATUS(s2)
.endm

.macro report text, register
    print   "\text"
    lwu     a0, \register(s2)
    call    print_hex
.endm

main:
    addi    sp, sp, -16
    sd      ra, 8(sp)
    li      s2, VIRTIO

    report  "magic=", MAGIC
    report  " version=", VERSION
    report  " device=", DEVICE_ID
    report  " vendor=", VENDOR_ID
    print   "\n"

    status  0
    status  1
    status  3
    lwu     t1, DEVICE_FEATURES(s2)
    /* Not the ring's features: indirect descriptors (28) and event indexes (29). */
    li      t2, ~(3 << 28)
    and     t1, t1, t2
    sw      t1, DRIVER_FEATURES(s2)
    status  NEGOTIATED
    report  "negotiated: status=", STATUS
    print   "\n"

    sw      zero, QUEUE_SEL(s2)
    li      t1, ENTRIES
    sw      t1, QUEUE_NUM(s2)
    place   QUEUE_DESC, descriptors
    place   QUEUE_DRIVER, available
    place   QUEUE_DEVICE, used
    li      t1, 1
    sw      t1, QUEUE_READY(s2)
    status  READY
    report  "ready: status=", STATUS
    print   "\n"

    describe 0, header, 16, DESC_NEXT
    describe 1, sector, SECTOR, DESC_NEXT | DESC_WRITE
    describe 2, outcome, 1, DESC_WRITE
    lla     t0, available
    sh      zero, 4(t0)
    fence   rw, rw
    li      t1, 1
    sh      t1, 2(t0)
    fence   rw, rw
    sw      zero, QUEUE_NOTIFY(s2)
    lla     t0, used
1:  lhu     t1, 2(t0)
    beqz    t1, 1b
    fence   r, r

    print   "read: status="
    lla     t0, outcome
    lbu     a0, 0(t0)
    call    print_hex
    print   " sector="
    lla     a0, sector
    li      a1, 16
    call    print_bytes
    print   "\n"

    ld      ra, 8(sp)
    addi    sp, sp, 16
    ret

    .data
    .balign 16
header:
    .word   BLK_IN, 0
    .dword  0
outcome:
    .byte   0xff

    .bss
    .balign 4096
descriptors:
    .space  16 * ENTRIES
    .balign 16
available:
    .space  6 + 2 * ENTRIES
    .balign 16
used:
    .space  6 + 8 * ENTRIES
    .balign 16
sector:
    .space  SECTOR
