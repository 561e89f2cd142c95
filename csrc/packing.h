#pragma once

#include <cstdint>
#include <vector>

namespace grpo {

// A packing plan is one block of int64, built by kernels/packing.py on the host and read where the
// copy runs (for CUDA it is uploaded once):
//
//   fields[F][3]            destination address, kind, element size in bytes
//   sources[F][S]           address of sequence s's first element of field f (0 if generated)
//   cu_seqlens int32[S+1]   packed row of each sequence's first token; cu_seqlens[S] = N
//
// An address per (field, sequence) makes ragged, padded, reordered and scattered sources the same
// thing: no index tensor over tokens, 8 bytes a sequence.
enum FieldKind : int64_t {
  kPerToken = 0,     // one element a token, contiguous within a sequence
  kPerSequence = 1,  // one element a sequence, repeated for its tokens
  kPosition = 2,     // int64, 0 .. length-1; generated
  kSegment = 3,      // int32, s; generated
};

struct Field {
  int64_t destination;  // 16-byte aligned
  int64_t kind;
  int64_t element_size;  // 1, 2, 4 or 8
};

// Unpacks one field: destination[s][t] = packed[cu_seqlens[s] + t], or pad past the sequence's end.
struct Unpack {
  int64_t destination;  // [num_sequences, row_length], contiguous, 16-byte aligned
  int64_t packed;       // [N]
  int64_t num_tokens;   // N: no element at or past it is read, whatever cu_seqlens says
  int64_t cu_seqlens;   // int32[S+1]
  int64_t num_sequences;
  int64_t row_length;
  int64_t element_size;
  int64_t pad_bits;  // the pad element in its low bytes
};

// What a plan points at; offsets only, so it can be made from a host or a device address.
struct PlanView {
  const Field* fields;
  const int64_t* sources;
  const int32_t* cu_seqlens;
  int64_t num_fields;
  int64_t num_sequences;
};

inline PlanView view_plan(int64_t address, int64_t num_fields, int64_t num_sequences) {
  const auto* words = reinterpret_cast<const int64_t*>(address);
  const int64_t* sources = words + 3 * num_fields;
  const auto* cu = reinterpret_cast<const int32_t*>(sources + num_fields * num_sequences);
  return {reinterpret_cast<const Field*>(words), sources, cu, num_fields, num_sequences};
}

// Throw std::invalid_argument before anything is written unless cu_seqlens ascends from 0 to
// num_tokens.
void pack_cpu(int64_t plan, int64_t num_fields, int64_t num_sequences, int64_t num_tokens);
void unpack_cpu(const Unpack& job);

#ifdef GRPO_ENGINE_WITH_CUDA
// Enqueue on `stream` of `device` and return; errors of the launch throw std::runtime_error.
void pack_cuda(int64_t plan, int64_t num_fields, int64_t num_sequences, int64_t num_tokens,
               int device, int64_t stream);
void unpack_cuda(const Unpack& job, int device, int64_t stream);
std::vector<int> cuda_architectures();
#endif

}  // namespace grpo
