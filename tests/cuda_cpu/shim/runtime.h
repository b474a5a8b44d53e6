// What the parts of the runtime share with each other and, through ctypes, with build.py.
#pragma once
#include <csetjmp>

#include "machine.h"

namespace kvc {

struct Range {
    uintptr_t begin, end;
    int writable;
};

// Filled by build.py; keep both in step.
struct Launch {
    void (*entry)(void**);
    void** arguments;
    unsigned grid[3], block[3];
    size_t shared;
    uintptr_t static_shared[2];  // begin and end of the library's static shared variables
    int schedule;
    unsigned seed;
    const Range* ranges;
    int range_count;
    char message[1024];
    uintptr_t failed_at;  // code address, relative to the library, when only that is known; else 0
};

extern Fiber fibers[MAX_THREADS];
extern Launch* launch;
extern bool failed;
extern int finished;
extern sigjmp_buf recovery;

void run_block();                       // scheduler.cpp
bool advance(Fiber& fiber);             // scheduler.cpp: runs a fiber if it can run
void wait_while(const unsigned* counter, const char* operation, Place place);
void forget_meetings();                 // collectives.cpp
void forget_copies();                   // copies.cpp
void describe_deadlock();               // scheduler.cpp
void begin_launch_memory();             // memory.cpp
void end_launch_memory();               // memory.cpp
void begin_block_memory();              // memory.cpp
void place_message(Place place, const char* text);
void fail_at(const void* code, const char* format, ...) __attribute__((noreturn));

}  // namespace kvc
