// The first numbers of the attention kernels' table: what a call and the next ones have in common.
#pragma once

#define HEADER 18
enum HeaderField {
    QUERY_ROW, QUERY_HEAD, QUERY_TOKEN,  // strides of the queries [B, heads * groups, q, HEAD_KEY] in numbers
    NEW_KEY_ROW, NEW_KEY_HEAD, NEW_KEY_TOKEN, NEW_VALUE_ROW, NEW_VALUE_HEAD, NEW_VALUE_TOKEN,  // of the new tokens
    NEWS,        // new tokens
    HEADS, GROUPS, QUERIES,
    RUNS,        // packed ones
    SLOTS,       // of work
    WORKS_AT,    // number of the first slot's entry
    OWNERS_AT,   // of the entries that say where a lane's slots begin
    ENTRIES_AT   // of the list of slots, lane by lane
};

#define NO_SCORE __int_as_float((int)0xff800000)
#define LN2 0.693147180559945309f
#define LOG2E 1.44269504088896341f
