// Which thread runs next. A missing barrier shows only under some orders, so there are several.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "fibers.h"
#include "runtime.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl kvc_switch
.hidden kvc_switch
.type kvc_switch, @function
kvc_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kvc_switch, . - kvc_switch
)");
#endif

namespace kvc {

Machine machine;
Fiber fibers[MAX_THREADS];
int finished;

// The order of SCHEDULES in build.py.
enum Schedule { FORWARD, REVERSE, RANDOM_THREADS, LOW_WARPS_FIRST, HIGH_WARPS_FIRST, ONE_WARP_AHEAD };

static uint64_t random_state;

static unsigned random_below(unsigned n) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((random_state >> 33) % n);
}

static void order(int* items, int n, bool reverse, bool shuffle) {
    for (int i = 0; i < n; ++i) items[i] = reverse ? n - 1 - i : i;
    if (shuffle)
        for (int i = n - 1; i > 0; --i) std::swap(items[i], items[random_below(i + 1)]);
}

static void run_thread() {
    launch->entry(launch->arguments);
    machine.current->finished = true;
    ++finished;
    for (;;) leave();
}

bool advance(Fiber& fiber) {
    if (fiber.finished || (fiber.waits_for && *fiber.waits_for == fiber.waits_at)) return false;
    fiber.waits_for = nullptr;
    enter(fiber);
    return true;
}

void wait_while(const unsigned* counter, const char* operation, Place place) {
    Fiber* fiber = machine.current;
    fiber->waits_at = *counter;
    fiber->waits_for = counter;
    fiber->operation = operation;
    fiber->place = place;
    leave();
}

void describe_deadlock() {
    char text[700];
    int used = snprintf(text, sizeof text, "deadlock: %d of %d threads have ended", finished, machine.threads);
    Fiber* first = nullptr;
    const Fiber* told[4];
    int count = 0;
    for (int i = 0; i < machine.threads; ++i) {
        Fiber& fiber = fibers[i];
        if (fiber.finished) continue;
        if (!first) first = &fiber;
        bool known = false;
        for (int k = 0; k < count; ++k)
            known |= told[k]->place.line == fiber.place.line && told[k]->operation == fiber.operation;
        if (known || count == 4) continue;
        told[count++] = &fiber;
        used += snprintf(text + used, sizeof text - used, "; thread %d waits in %s at %s:%d", i, fiber.operation,
                         fiber.place.file, fiber.place.line);
    }
    machine.current = first;
    failed = true;
    place_message(first->place, text);
}

static bool run_threads(bool reverse, bool shuffle) {
    static int threads[MAX_THREADS];
    order(threads, machine.threads, reverse, shuffle);
    bool moved = false;
    for (int i = 0; i < machine.threads && !failed; ++i) moved |= advance(fibers[threads[i]]);
    return moved;
}

// The first warp that can run does so until all its lanes wait; then the search starts again at the front.
static bool run_warp(const int* warps, int count) {
    for (int i = 0; i < count; ++i) {
        int begin = warps[i] * WARP, end = std::min(begin + WARP, machine.threads);
        bool moved = false, again = true;
        while (again && !failed) {
            again = false;
            for (int k = begin; k < end && !failed; ++k) again |= advance(fibers[k]);
            moved |= again;
        }
        if (moved) return true;
    }
    return false;
}

void run_block() {
    stacks.reserve();
    random_state = launch->seed * 0x9e3779b97f4a7c15ull + machine.block_epoch;
    forget_meetings();
    forget_copies();
    begin_block_memory();
    finished = 0;
    for (int i = 0; i < machine.threads; ++i) {
        Fiber& fiber = fibers[i];
        unsigned x = machine.block_size.x, y = machine.block_size.y;
        fiber = Fiber{};
        fiber.linear = i;
        fiber.index = {i % x, i / x % y, i / (x * y)};
        prepare(fiber, run_thread);
    }
    int schedule = launch->schedule, warps[MAX_THREADS / WARP], warp_count = (machine.threads + WARP - 1) / WARP;
    order(warps, warp_count, schedule == HIGH_WARPS_FIRST, schedule == ONE_WARP_AHEAD);
    while (finished < machine.threads && !failed) {
        bool by_thread = schedule <= RANDOM_THREADS;
        bool moved = by_thread ? run_threads(schedule == REVERSE, schedule == RANDOM_THREADS) : run_warp(warps, warp_count);
        if (!moved && !failed) describe_deadlock();
    }
}

}  // namespace kvc
