// Every load and store of a kernel is looked at: g++ -fsanitize=thread calls __tsan_* before each one and
// -fsanitize=bounds,alignment,... calls __ubsan_*; both sets of functions are ours, no sanitizer library is linked.
//
// Found here, whatever the schedule: accesses outside the tensors that were passed, writes through const pointers,
// reads of shared memory that nothing wrote in this block, and races (two threads touch one byte of shared or global
// memory, one of them writes, and no barrier lies between).
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fibers.h"
#include "runtime.h"

#define KVC_HANDLER extern "C" __attribute__((visibility("default")))

namespace kvc {

constexpr long MOST_ACCESSES = 20'000'000;  // a part of a second of a thread that spins

// Who touched a byte last, and when.
struct Trace {
    unsigned write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
    short writer, reader;
    bool atomic, several_lanes, several_warps;
};

struct Watched {
    uintptr_t begin, end;
    bool shared, writable;
    Trace* traces;  // a byte each; null where nothing can race
};

static std::vector<Watched> watched;
static size_t recent;
static struct Module {
    uintptr_t begin, end;
    bool holds(uintptr_t address) const { return address - begin < end - begin; }
} modules[2];  // code, constants and variables of the kernels' library and of this one

struct Search {
    uintptr_t address;
    Module found;
};

static int find_module(dl_phdr_info* info, size_t, void* data) {
    auto& search = *static_cast<Search*>(data);
    Module module{~uintptr_t(0), 0};
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& part = info->dlpi_phdr[i];
        if (part.p_type != PT_LOAD) continue;
        module.begin = std::min<uintptr_t>(module.begin, info->dlpi_addr + part.p_vaddr);
        module.end = std::max<uintptr_t>(module.end, info->dlpi_addr + part.p_vaddr + part.p_memsz);
    }
    if (!module.holds(search.address)) return 0;
    search.found = module;
    return 1;
}

static Module module_of(const void* inside) {
    Search search{reinterpret_cast<uintptr_t>(inside), {}};
    dl_iterate_phdr(find_module, &search);
    return search.found;
}

void begin_launch_memory() {
    modules[0] = module_of(reinterpret_cast<void*>(launch->entry));
    modules[1] = module_of(&machine);
    recent = 0;
    machine.launch_epoch = ++machine.epoch;
    auto add = [](uintptr_t begin, uintptr_t end, bool shared, bool writable) {
        // calloc takes no memory for traces that nothing touches
        void* traces = begin != end && writable ? calloc(end - begin, sizeof(Trace)) : nullptr;
        if (begin != end) watched.push_back({begin, end, shared, writable, static_cast<Trace*>(traces)});
    };
    auto dynamic = reinterpret_cast<uintptr_t>(machine.dynamic);
    add(dynamic, dynamic + launch->shared, true, true);
    add(launch->static_shared[0], launch->static_shared[1], true, true);
    for (int i = 0; i < launch->range_count; ++i)
        add(launch->ranges[i].begin, launch->ranges[i].end, false, launch->ranges[i].writable);
}

void end_launch_memory() {
    for (auto& part : watched) free(part.traces);
    watched.clear();
}

// NaN in every float format, -1 in every integer one: a value that shows if it is used.
void begin_block_memory() {
    machine.block_epoch = ++machine.epoch;
    machine.fenced = false;
    for (auto& part : watched)
        if (part.shared) memset(reinterpret_cast<void*>(part.begin), 0xff, part.end - part.begin);
}

void fence() { machine.fenced = true; }

static bool warp_synced(unsigned then, int thread) { return machine.warp_epoch[thread / WARP] != then; }

// Nothing orders the touch by `other` at `epoch` before what the current thread does now.
static bool unordered(const Watched& part, int other, unsigned epoch, unsigned warp_epoch, bool several) {
    int self = machine.current->linear;
    if (epoch < machine.block_epoch) return !part.shared && epoch >= machine.launch_epoch && !machine.fenced;
    if (epoch != machine.epoch) return false;
    if (other / WARP != self / WARP) return true;
    return (several || other != self) && !warp_synced(warp_epoch, self);
}

static const char* race(const Watched& part, Trace& trace, Access access) {
    int self = machine.current->linear;
    unsigned synced = machine.warp_epoch[self / WARP];
    const char* found = nullptr;
    bool both_atomic = trace.atomic && access == ATOMIC;
    if (trace.write_epoch && !both_atomic && unordered(part, trace.writer, trace.write_epoch, trace.write_warp_epoch, false))
        found = access == READ ? "reads what thread %d wrote" : "writes what thread %d wrote";
    if (access == READ) {
        bool again = trace.read_epoch == machine.epoch;
        trace.several_warps = again && (trace.several_warps || trace.reader / WARP != self / WARP);
        trace.several_lanes = again && trace.read_warp_epoch == synced && (trace.several_lanes || trace.reader != self);
        trace.read_epoch = machine.epoch;
        trace.read_warp_epoch = synced;
        trace.reader = static_cast<short>(self);
    } else {
        bool read = trace.read_epoch && trace.read_epoch >= machine.launch_epoch;
        bool others = read && trace.several_warps && trace.read_epoch == machine.epoch;
        if (others || (read && unordered(part, trace.reader, trace.read_epoch, trace.read_warp_epoch, trace.several_lanes)))
            found = "writes what thread %d read";
        trace.write_epoch = machine.epoch;
        trace.write_warp_epoch = synced;
        trace.writer = static_cast<short>(self);
        trace.atomic = access == ATOMIC;
    }
    return found;
}

static Watched* find(uintptr_t address, size_t size, Access access) {
    Watched* readable = nullptr;
    for (size_t i = 0; i < watched.size(); ++i) {
        size_t k = i == 0 ? recent : i <= recent ? i - 1 : i;
        Watched& part = watched[k];
        if (address < part.begin || address + size > part.end) continue;
        if (access == READ || part.writable) {
            recent = k;
            return &part;
        }
        readable = &part;
    }
    return readable;
}

static void check(uintptr_t address, size_t size, Access access, const void* code, Place place) {
    if (stacks.holds(address) || !machine.current) return;
    if (++machine.accesses > MOST_ACCESSES) fail_at(code, "no end: %ld accesses without waiting for others", MOST_ACCESSES);
    Watched* part = find(address, size, access);
    auto report = [&](const char* format, auto... values) {
        if (code) fail_at(code, format, values...);
        fail(place, format, values...);
    };
    const char* verb = access == READ ? "read" : access == WRITE ? "write" : "atomic";
    if (!part) {
        if (modules[0].holds(address) || modules[1].holds(address)) return;
        report("out of bounds: %s of %zu bytes at %p, outside every tensor and shared memory", verb, size, (void*)address);
    } else if (access != READ && !part->writable) {
        report("%s of %zu bytes through a pointer to const data", verb, size);
    }
    if (!part->traces) return;
    for (size_t i = address - part->begin; i < address - part->begin + size; ++i) {
        Trace& trace = part->traces[i];
        if (part->shared && access != WRITE && trace.write_epoch < machine.block_epoch)
            report("reads shared memory that this block has not written (byte %zu)", i);
        int other = access == READ || trace.write_epoch == machine.epoch ? trace.writer : trace.reader;
        bool earlier = std::max(trace.write_epoch, trace.read_epoch) < machine.block_epoch;
        if (const char* found = race(*part, trace, access)) {
            char text[200];
            snprintf(text, sizeof text, "race in %s memory: %s%s with no barrier between", part->shared ? "shared" : "global",
                     found, earlier ? " in another block" : "");
            report(text, other);
        }
    }
}

void check_access(const volatile void* address, size_t size, Access access, Place place) {
    check(reinterpret_cast<uintptr_t>(address), size, access, nullptr, place);
}

}  // namespace kvc

#define KVC_HOOK(name, access, size)                                                              \
    KVC_HANDLER void __tsan_##name(void* address) {                                                \
        kvc::check(reinterpret_cast<uintptr_t>(address), size, kvc::access, __builtin_return_address(0), {}); \
    }
#define KVC_HOOKS(size)                          \
    KVC_HOOK(read##size, READ, size)             \
    KVC_HOOK(write##size, WRITE, size)           \
    KVC_HOOK(unaligned_read##size, READ, size)   \
    KVC_HOOK(unaligned_write##size, WRITE, size) \
    KVC_HOOK(volatile_read##size, READ, size)    \
    KVC_HOOK(volatile_write##size, WRITE, size)
KVC_HOOKS(1)
KVC_HOOKS(2)
KVC_HOOKS(4)
KVC_HOOKS(8)
KVC_HOOKS(16)
KVC_HANDLER void __tsan_read_range(void* address, size_t size) {
    kvc::check(reinterpret_cast<uintptr_t>(address), size, kvc::READ, __builtin_return_address(0), {});
}
KVC_HANDLER void __tsan_write_range(void* address, size_t size) {
    kvc::check(reinterpret_cast<uintptr_t>(address), size, kvc::WRITE, __builtin_return_address(0), {});
}
KVC_HANDLER void __tsan_init() {}
KVC_HANDLER void __tsan_func_entry(void*) {}
KVC_HANDLER void __tsan_func_exit() {}

// The layout that g++ gives the first argument of each handler: where, then what.
struct Location {
    const char* file;
    unsigned line, column;
};
static kvc::Place at(const Location* where) { return {where->file, static_cast<int>(where->line)}; }

KVC_HANDLER void __ubsan_handle_out_of_bounds(Location* where, size_t index) {
    kvc::fail(at(where), "out of bounds: index %zd of an array", index);
}
KVC_HANDLER void __ubsan_handle_type_mismatch_v1(Location* where, size_t address) {
    kvc::fail(at(where), "misaligned access at %p", reinterpret_cast<void*>(address));
}
KVC_HANDLER void __ubsan_handle_shift_out_of_bounds(Location* where, size_t, size_t by) {
    kvc::fail(at(where), "shift by %zd, outside the bits of the type", by);
}
KVC_HANDLER void __ubsan_handle_divrem_overflow(Location* where, size_t, size_t) {
    kvc::fail(at(where), "division by zero");
}
#define KVC_OVERFLOW(name)                                                                    \
    KVC_HANDLER void __ubsan_handle_##name##_overflow(Location* where, size_t, size_t) {       \
        kvc::fail(at(where), "signed integer overflow");                                      \
    }
KVC_OVERFLOW(add)
KVC_OVERFLOW(sub)
KVC_OVERFLOW(mul)
KVC_OVERFLOW(negate)
