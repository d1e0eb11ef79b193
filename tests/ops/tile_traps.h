// Runs the tile instructions that a compiler made on a processor without them: it refuses each by SIGILL, and the handler
// does by tile_model.h what the instruction would do. For Linux and x86-64, compiled with -mamx-tile -mamx-bf16.
//
// So it shows what the model alone does not: that the compiler has written to memory what a tile loads.
#pragma once
#define TILES_ARE_TRAPPED
#include <signal.h>
#include <ucontext.h>

#include "tile_model.h"

namespace {
namespace tile_traps {

struct sigaction before;

// In the order of their numbers in instructions.
constexpr int REGISTERS[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction of 0F38 with a VEX prefix of three bytes, vectors of 128 bits and W = 0.
struct Instruction {
  int prefix, opcode, reg, rm, third, length = 5;  // `third` is VEX.vvvv
  bool in_memory, has_index = false;
  const uint8_t *address = nullptr;  // without the index for tiles, whose index is the stride
  int64_t index = 0;

  static bool is_here(const uint8_t *code) { return code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x84) == 0; }

  Instruction(const uint8_t *code, const greg_t *registers)
      : prefix(code[2] & 3), opcode(code[3]), reg(code[4] >> 3 & 7), rm(code[4] & 7), third(~code[2] >> 3 & 15),
        in_memory(code[4] >> 6 != 3) {
    if (!in_memory) return;
    int mode = code[4] >> 6, base = rm, high_base = code[1] & 0x20 ? 0 : 8, high_index = code[1] & 0x40 ? 0 : 8;
    if (rm == 4) {
      int scaled = code[length++], number = (scaled >> 3 & 7) | high_index;
      base = scaled & 7, has_index = true;
      if (number != 4) index = registers[REGISTERS[number]] << (scaled >> 6);
    }
    bool far = mode == 2 || (mode == 0 && base == 5);
    int32_t distance = 0;
    if (mode == 1) distance = int8_t(code[length]);
    if (far) std::memcpy(&distance, code + length, sizeof distance);
    length += far ? 4 : mode == 1 ? 1 : 0;
    int64_t from = mode == 0 && base == 5 ? (rm == 5 ? int64_t(code) + length : 0) : registers[REGISTERS[base | high_base]];
    address = reinterpret_cast<const uint8_t *>(from + distance);
  }
};

// Does what the instruction does. Returns whether it is one of tiles.
bool execute(const Instruction &i) {
  enum { NONE, P66, PF3, PF2 };
  if (i.opcode == 0x49 && i.prefix == NONE && i.in_memory)
    tile_model::load_configuration(i.address + i.index);
  else if (i.opcode == 0x49 && i.prefix == NONE && i.reg == 0 && i.rm == 0)
    tile_model::release();
  else if (i.opcode == 0x49 && i.prefix == PF2 && !i.in_memory && i.rm == 0)
    tile_model::zero(i.reg);
  else if (i.opcode == 0x4b && (i.prefix == PF2 || i.prefix == P66) && i.has_index)
    tile_model::load(i.reg, i.address, i.index);
  else if (i.opcode == 0x4b && i.prefix == PF3 && i.has_index)
    tile_model::store(i.reg, const_cast<uint8_t *>(i.address), i.index);
  else if (i.opcode == 0x5c && i.prefix == PF3 && !i.in_memory)
    tile_model::multiply(i.reg, i.rm, i.third);
  else
    return false;
  return true;
}

void handle(int, siginfo_t *, void *context) {
  greg_t *registers = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
  auto *code = reinterpret_cast<const uint8_t *>(registers[REG_RIP]);
  if (Instruction::is_here(code)) {
    Instruction instruction(code, registers);
    if (execute(instruction)) {
      registers[REG_RIP] += instruction.length;
      return;
    }
  }
  sigaction(SIGILL, &before, nullptr);  // which handles it when this returns
}

bool install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, &before) == 0;
}

const bool INSTALLED = install();

}  // namespace tile_traps
}  // namespace
