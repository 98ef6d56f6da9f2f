/*
 * The order of rvmm's code (build.rs; --section-ordering-file of GNU ld 2.43 and newer). Code that
 * a running guest needs comes first and together. The host maps code in units of 64 KiB around each
 * page that is used, so a running machine keeps a fifth less of it in memory. The other code
 * follows in its usual order. The names use Rust's legacy mangling; a pattern that matches nothing
 * has no effect.
 */
.text : {
  *(.text._ZN4rvmm4vcpu* .text._ZN4rvmm3bus* .text._ZN4rvmm7irqchip* .text._ZN4rvmm7devices*)
  *(.text._ZN4rvmm6virtio* .text._ZN4rvmm10hypervisor* .text._ZN4rvmm3pci* .text._ZN4rvmm6memory* .text._ZN4rvmm4util*)
  /* The bodies of threads, which the standard library calls. The vCPU's loop is one of them. */
  *(.text._ZN3std3sys9backtrace*)
  /* Implementations of traits: their names begin with the type. */
  *(.text._ZN*_?LT?rvmm..vcpu* .text._ZN*_?LT?rvmm..bus* .text._ZN*_?LT?rvmm..irqchip* .text._ZN*_?LT?rvmm..devices*)
  *(.text._ZN*_?LT?rvmm..virtio* .text._ZN*_?LT?rvmm..hypervisor* .text._ZN*_?LT?rvmm..pci*)
  *(.text._ZN12virtio_queue* .text._ZN*_?LT?virtio_queue* .text._ZN9vm_memory* .text._ZN*_?LT?vm_memory*)
  *(.text._ZN8io_uring*)
  /* The main loop, which waits. */
  *(.text._ZN4rvmm7machine8mainloop* .text._ZN4rvmm7machine8meantime* .text._ZN*_?LT?rvmm..machine..mainloop*)
  *(.text._ZN13event_manager* .text._ZN*_?LT?event_manager* .text._ZN12vmm_sys_util*)
  *(.text._ZN4core4sync* .text._ZN3std4sync* .text._ZN3std6thread* .text._ZN3std4time*)
  *(.text._ZN3std3sys4sync* .text._ZN3std3sys3pal4unix*)
}
