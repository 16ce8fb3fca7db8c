// Fibers: separate stacks that hand over to each other.
#pragma once

#include <cstddef>

namespace simt {

// A stack of `bytes` with an unmapped page below it. Never freed.
char* new_stack(size_t bytes);
// The stack pointer of a fiber that will start in `entry`.
void* start_of(char* stack, size_t bytes, unsigned stagger, void (*entry)());

}  // namespace simt

// Saves the callee-saved registers and the stack pointer to *from, and goes on at `to`.
extern "C" void simt_switch(void** from, void* to);
