/*
 * The order of rvmm's code (build.rs; --section-ordering-file of GNU ld 2.43 and newer). Code that
 * a running guest needs comes first and together. The host maps code in units of 64 KiB around
 * each page that is used, so a running machine keeps less of it in memory (docs/performance.md,
 * "Code in order"). The other code follows in its usual order. The names use Rust's legacy
 * mangling; a pattern that matches nothing has no effect.
 */
.text : {
  /* Exits, and the devices that every guest uses. */
  *(.text._ZN4rvmm4vcpu6thread* .text._ZN4rvmm4vcpu5exits* .text._ZN4rvmm4vcpu3sbi* .text._ZN4rvmm4vcpu5first* .text._ZN4rvmm4vcpu7restart*)
  *(.text._ZN4rvmm3bus* .text._ZN4rvmm7irqchip* .text._ZN4rvmm7devices*)
  /* The bodies of threads, which the standard library calls. The vCPU's loop is one of them. */
  *(.text._ZN3std3sys9backtrace*)
  /* Implementations of traits: their names begin with the type. */
  *(.text._ZN*_?LT?rvmm..vcpu* .text._ZN*_?LT?rvmm..bus* .text._ZN*_?LT?rvmm..irqchip* .text._ZN*_?LT?rvmm..devices*)
  *(.text._ZN4rvmm10hypervisor* .text._ZN*_?LT?rvmm..hypervisor*)
  /* The main loop, and util::text, which it calls to release the code of the start. */
  *(.text._ZN4rvmm7machine8mainloop* .text._ZN4rvmm7machine8meantime* .text._ZN*_?LT?rvmm..machine..mainloop*)
  /* The watcher, which looks now and then, and what a vCPU does for it. */
  *(.text._ZN4rvmm7machine7watcher* .text._ZN4rvmm4util7cputime* .text._ZN4rvmm4vcpu4hart* .text.unlikely._ZN4rvmm4vcpu6thread*)
  *libc.a:pthread_getcpuclockid.o(.text) *libc.a:pthread_kill.o(.text) *libc.a:getpid.o(.text)
  *(.text._ZN4rvmm4util4text* .text._ZN13event_manager* .text._ZN*_?LT?event_manager* .text._ZN12vmm_sys_util*)
  /* What the groups above call: locks, channels, time and buffers of the standard library, and the C library. */
  *(.text._ZN3std4sync* .text._ZN3std3sys4sync* .text.unlikely._ZN3std3sys4sync* .text._ZN3std4time*)
  *(.text._ZN3std3sys3pal4unix4time* .text._ZN*_?LT?alloc..collections..vec_deque* .text._ZN5alloc11collections9vec_deque*)
  *(.text.unlikely._ZN5alloc7raw_vec* .text._ZN5alloc4sync* .text._ZN3std6thread* .text.unlikely._ZN3std6thread*)
  *libc.a:malloc.o(.text) *libc.a:mem*.o(.text) *libc.a:errno-loc.o(.text) *libc.a:clock_gettime.o(.text)
  *libc.a:ioctl.o(.text) *libc.a:syscall*.o(.text) *libc.a:sysdep.o(.text) *libc.a:cancellation.o(.text)
  *libc.a:epoll_*.o(.text) *libc.a:poll.o(.text) *libc.a:futex-internal.o(.text)
  *libc.a:read.o(.text) *libc.a:write.o(.text) *libc.a:readv.o(.text) *libc.a:writev.o(.text)
  /* Disks and networks. */
  *(.text._ZN4rvmm6virtio* .text._ZN4rvmm3pci* .text._ZN4rvmm6memory* .text._ZN4rvmm4util*)
  *(.text._ZN*_?LT?rvmm..virtio* .text._ZN*_?LT?rvmm..pci*)
  *(.text._ZN12virtio_queue* .text._ZN*_?LT?virtio_queue* .text._ZN9vm_memory* .text._ZN*_?LT?vm_memory*)
  *(.text._ZN8io_uring*)
}
