// One launch: every block in turn, errors and signals turned into a message.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "fibers.h"
#include "runtime.h"

namespace kvc {

Launch* launch;
bool failed;
sigjmp_buf recovery;

void place_message(Place place, const char* text) {
    char where[200] = "";
    if (place.file) snprintf(where, sizeof where, ", %s:%d", place.file, place.line);
    const Fiber* fiber = machine.current;
    snprintf(launch->message, sizeof launch->message, "%s (thread %d, block %u,%u,%u%s)", text, fiber ? fiber->linear : -1,
             machine.block.x, machine.block.y, machine.block.z, where);
}

[[noreturn]] static void stop(Place place, const char* format, va_list values) {
    char text[700];
    vsnprintf(text, sizeof text, format, values);
    failed = true;
    place_message(place, text);
    for (;;) leave();
}

void fail(Place place, const char* format, ...) {
    va_list values;
    va_start(values, format);
    stop(place, format, values);
}

static uintptr_t relative(const void* code) {
    Dl_info info;
    return dladdr(code, &info) ? reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
}

void fail_at(const void* code, const char* format, ...) {
    if (code) launch->failed_at = relative(code) - 1;  // a return address; the call lies before it
    va_list values;
    va_start(values, format);
    stop({}, format, values);
}

static void on_signal(int number, siginfo_t* info, void* context) {
    char text[100];
    snprintf(text, sizeof text, "%s at address %p", number == SIGFPE ? "bad arithmetic" : "bad or misaligned access",
             info->si_addr);
    failed = true;
    place_message({}, text);
#if defined(__x86_64__)
    launch->failed_at = relative(reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]));
#else
    (void)context;
#endif
    siglongjmp(recovery, 1);
}

struct Signals {  // ours while a launch runs, whatever was there afterwards
    struct sigaction before[3];
    stack_t stack_before;
    static constexpr int numbers[3] = {SIGSEGV, SIGBUS, SIGFPE};
    Signals() {
        static char stack[1 << 16];
        stack_t ours{};
        ours.ss_sp = stack;
        ours.ss_size = sizeof stack;
        sigaltstack(&ours, &stack_before);
        struct sigaction action {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; ++i) sigaction(numbers[i], &action, &before[i]);
    }
    ~Signals() {
        for (int i = 0; i < 3; ++i) sigaction(numbers[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

// Dynamic shared memory ends at an unmapped page.
static unsigned char* shared_memory(size_t bytes) {
    constexpr size_t room = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
    static unsigned char* base = nullptr;
    if (!base) {
        base = static_cast<unsigned char*>(
            mmap(nullptr, room + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(base + room, PAGE, PROT_NONE);
    }
    return base + room - (bytes + 15) / 16 * 16;
}

static Index block_at(unsigned number, const unsigned* grid) {
    return {number % grid[0], number / grid[0] % grid[1], number / (grid[0] * grid[1])};
}

static void run(unsigned blocks) {
    for (unsigned i = 0; i < blocks && !failed; ++i) {
        unsigned forward = launch->schedule % 2 == 0;
        machine.block = block_at(forward ? i : blocks - 1 - i, launch->grid);
        run_block();
    }
}

}  // namespace kvc

// 0 when every block ended well; else launch->message says what happened.
extern "C" __attribute__((visibility("default"))) int kvc_run(kvc::Launch* launch) {
    using namespace kvc;
    kvc::launch = launch;
    failed = false;
    launch->message[0] = 0;
    launch->failed_at = 0;
    machine.grid_size = {launch->grid[0], launch->grid[1], launch->grid[2]};
    machine.block_size = {launch->block[0], launch->block[1], launch->block[2]};
    machine.threads = static_cast<int>(launch->block[0] * launch->block[1] * launch->block[2]);
    machine.dynamic = shared_memory(launch->shared);
    begin_launch_memory();
    Signals signals;
#if defined(__x86_64__)
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);  // subnormal floats are zero, as with the flag -ftz=true on the GPU
#endif
    if (!sigsetjmp(recovery, 1)) run(launch->grid[0] * launch->grid[1] * launch->grid[2]);
#if defined(__x86_64__)
    _mm_setcsr(mode);
#endif
    machine.current = nullptr;
    end_launch_memory();
    return failed;
}
