// Stacks and switching between them: a few pushes on x86-64, ucontext elsewhere. Private to the runtime.
#pragma once
#include <sys/mman.h>

#include <cstdint>

#include "machine.h"
#if !defined(__x86_64__) || defined(KVC_UCONTEXT)
#include <ucontext.h>
#endif

namespace kvc {

constexpr size_t STACK = 256 * 1024;  // bytes of address space a fiber; only touched pages cost memory
constexpr size_t PAGE = 4096;

struct Stacks {
    unsigned char* base = nullptr;

    // Stacks grow down, so the lowest page of each is left unmapped.
    void reserve() {
        if (base) return;
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        base = static_cast<unsigned char*>(mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE, flags, -1, 0));
        for (int i = 0; i < MAX_THREADS; ++i) mprotect(base + i * STACK, PAGE, PROT_NONE);
    }
    unsigned char* top(int i) const { return base + (i + 1) * STACK; }
    bool holds(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(base) < STACK * MAX_THREADS; }
};
inline Stacks stacks;

#if defined(__x86_64__) && !defined(KVC_UCONTEXT)

extern "C" void kvc_switch(void** save, void* resume);
inline void* scheduler_stack;

inline void prepare(Fiber& fiber, void (*start)()) {
    void** top = reinterpret_cast<void**>(stacks.top(fiber.linear) - 64);
    *--top = nullptr;  // the fiber never returns; this keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(start);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // rbp, rbx, r12 to r15
    fiber.stack_pointer = top;
}
inline void enter(Fiber& fiber) {
    machine.current = &fiber;
    machine.accesses = 0;
    kvc_switch(&scheduler_stack, fiber.stack_pointer);
}
inline void leave() { kvc_switch(&machine.current->stack_pointer, scheduler_stack); }

#else

inline ucontext_t contexts[MAX_THREADS], scheduler_context;

inline void prepare(Fiber& fiber, void (*start)()) {
    ucontext_t& context = contexts[fiber.linear];
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.top(fiber.linear) - STACK + PAGE;
    context.uc_stack.ss_size = STACK - PAGE;
    makecontext(&context, start, 0);
}
inline void enter(Fiber& fiber) {
    machine.current = &fiber;
    machine.accesses = 0;
    swapcontext(&scheduler_context, &contexts[fiber.linear]);
}
inline void leave() { swapcontext(&contexts[machine.current->linear], &scheduler_context); }

#endif

}  // namespace kvc
