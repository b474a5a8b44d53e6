// Barriers of a block and meetings of the lanes of a warp.
#include <cstdio>
#include <cstring>

#include "fibers.h"
#include "runtime.h"

namespace kvc {

struct Meeting {
    unsigned mask, arrived, generation, size;
    const char* operation;
    Place place;
    Slots slots[2];  // by generation: a quick lane may start the next meeting before a slow one has read this one
};
constexpr int MEETINGS = 8;  // different masks that one warp can use in a block

static struct {
    int count;
    Meeting meetings[MEETINGS];
} warps[MAX_THREADS / WARP];

static struct {
    unsigned arrived, generation;
    int true_count, result[2];
    const char* operation;
    Place place;
} block;

static bool same(Place a, Place b) { return a.line == b.line && !strcmp(a.file, b.file); }

void forget_meetings() {
    for (auto& warp : warps) warp.count = 0;
    block.arrived = 0;
}

int barrier(int predicate, const char* operation, Place place) {
    if (block.arrived == 0) {
        block.operation = operation;
        block.place = place;
        block.true_count = 0;
    } else if (!same(block.place, place) || strcmp(block.operation, operation)) {
        fail(place, "divergent barrier: this thread is in %s, others wait in %s at %s:%d", operation, block.operation,
             block.place.file, block.place.line);
    }
    block.true_count += predicate != 0;
    unsigned generation = block.generation;
    if (++block.arrived == static_cast<unsigned>(machine.threads)) {
        block.result[generation & 1] = block.true_count;
        block.arrived = 0;
        ++block.generation;
        ++machine.epoch;
    } else {
        wait_while(&block.generation, operation, place);
    }
    return block.result[generation & 1];
}

const Slots& exchange(unsigned mask, const void* data, size_t size, const char* operation, Place place) {
    int lane = machine.current->linear % WARP, number = machine.current->linear / WARP;
    int lanes = machine.threads - number * WARP;
    if (lanes < WARP) mask &= (1u << lanes) - 1;  // the last warp of an odd block
    if (!(mask >> lane & 1)) fail(place, "%s: lane %d is not in its own mask %#x", operation, lane, mask);
    auto& warp = warps[number];
    Meeting* meeting = nullptr;
    for (int i = 0; i < warp.count; ++i) {
        Meeting& other = warp.meetings[i];
        if (other.mask == mask) meeting = &other;
        else if (other.arrived && (other.mask & mask))
            fail(place, "lanes of one warp are at different collectives: lane %d is in %s with mask %#x, others wait in "
                 "%s with mask %#x at %s:%d", lane, operation, mask, other.operation, other.mask, other.place.file,
                 other.place.line);
    }
    if (!meeting) {
        if (warp.count == MEETINGS) fail(place, "%s: more than %d different masks in one warp", operation, MEETINGS);
        meeting = &warp.meetings[warp.count++];
        meeting->mask = mask;
        meeting->arrived = meeting->generation = 0;
    }
    if (!meeting->arrived) {
        meeting->operation = operation;
        meeting->place = place;
        meeting->size = static_cast<unsigned>(size);
    } else if (!same(meeting->place, place) || strcmp(meeting->operation, operation) || meeting->size != size) {
        fail(place, "lanes of one warp are at different collectives: lane %d is in %s, others wait in %s at %s:%d", lane,
             operation, meeting->operation, meeting->place.file, meeting->place.line);
    }
    Slots& slots = meeting->slots[meeting->generation & 1];
    memcpy(slots.lane[lane], data, size);
    meeting->arrived |= 1u << lane;
    if (meeting->arrived == mask) {
        meeting->arrived = 0;
        ++meeting->generation;
        if (!strcmp(operation, "__syncwarp")) ++machine.warp_epoch[number];
    } else {
        wait_while(&meeting->generation, operation, place);
    }
    return slots;
}

}  // namespace kvc
