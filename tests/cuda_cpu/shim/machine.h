// The emulated machine as both sides see it: the runtime (*.cpp, plain code) and the kernels (instrumented code).
//
// One block runs at a time. Each of its threads is a fiber with a stack of its own; a fiber runs until it must wait
// for others (barrier, warp collective) and then hands over to the scheduler, which picks the next one.
#pragma once
#include <cstddef>
#include <cstdint>

// The kernels' libraries are linked with the runtime's.
#pragma GCC visibility push(default)
namespace kvc {

constexpr int MAX_THREADS = 1024;
constexpr int WARP = 32;
constexpr size_t MAX_SHARED = 227 * 1024;  // bytes of dynamic shared memory that one block can have (sm_90)
constexpr size_t MAX_PAYLOAD = 64;         // bytes that a lane can hand to a warp collective

struct Index {
    unsigned x, y, z;
};

struct Place {
    const char* file;
    int line;
};

struct Fiber {
    void* stack_pointer;
    Index index;
    int linear;                 // thread number inside the block
    bool finished;
    const unsigned* waits_for;  // a generation counter, or null when the fiber can run
    unsigned waits_at;          // it waits as long as the counter has this value
    const char* operation;      // what it waits in, for messages
    Place place;
};

struct Machine {
    Fiber* current;
    Index block, block_size, grid_size;
    int threads;             // in the block
    unsigned char* dynamic;  // dynamic shared memory of the block
    unsigned epoch;          // grows with every barrier and every block
    unsigned block_epoch;    // epoch at which the block began
    unsigned launch_epoch;   // epoch at which the launch began
    unsigned warp_epoch[MAX_THREADS / WARP];  // grows with every __syncwarp of a warp
    long accesses;           // of the current thread since it went on
    bool fenced;             // a thread of the block called __threadfence
};
extern Machine machine;

struct Slots {
    alignas(16) unsigned char lane[WARP][MAX_PAYLOAD];
};

// Barrier of the whole block; returns how many predicates were true, of how many threads.
int barrier(int predicate, const char* operation, Place place);
// Every lane of the mask hands in `size` bytes and gets what all of them handed in.
const Slots& exchange(unsigned mask, const void* data, size_t size, const char* operation, Place place);
// Ends the launch with a message; `%` arguments as in printf. Never returns to the kernel.
[[noreturn]] void fail(Place place, const char* format, ...);

enum Access { READ, WRITE, ATOMIC };
// Checks an access that the compiler does not report (atomics, twins of PTX).
void check_access(const volatile void* address, size_t size, Access access, Place place);
void fence();

// Asynchronous copies to shared memory: asked for, put into a group, waited for but for the newest `left` groups.
void copy_later(void* to, const void* from, size_t size, Place place);
void commit_copies();
void wait_copies(int left, Place place);

}  // namespace kvc
#pragma GCC visibility pop
