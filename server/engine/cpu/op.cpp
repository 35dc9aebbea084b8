// The torch op loraplex::add_lora, and what it works on: the weights in each slot of each layer, and
// which rows of the running step belong to which slot.
#include <ATen/Parallel.h>
#include <ATen/ATen.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels.h"

namespace loraplex {
namespace {

// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t WORTH_A_THREAD = 200'000;
constexpr int64_t BLOCK = 32;  // rows that go through both products together, their h in L1
constexpr int64_t PANEL = 64;  // columns of B that lie together

// The adapter of one layer and slot. A has the slices of a fused layer (q, k, v) below each other,
// so that x is read once for all. B lies in panels of columns, [rank, PANEL] after [rank, PANEL] and
// a narrower last one: the order in which it is read, so that memory sees one stream.
struct Slice {
  at::Tensor panels;
  int64_t first_rank, rank, first_output, width;
};
struct Weights {
  at::Tensor a;
  std::vector<Slice> slices;
  int64_t rank = 0;     // of all slices together
  int64_t outputs = 0;  // numbers in B, all slices together
  int64_t end = 0;      // columns that y has at least
};
using Packed = std::shared_ptr<const Weights>;
struct Layer {
  int64_t batch;
  std::vector<Packed> slots;  // null: empty
};

struct Group {
  int64_t slot, first, count;  // rows[first : first + count]
};
struct Batch {
  std::vector<int32_t> rows;
  std::vector<Group> groups;
  int32_t last_row = -1;
};

std::vector<Layer> layers;
std::vector<Batch> batches;

// What has been packed, by its number. Unlike the rest, any thread comes here.
std::map<int64_t, Packed> packed;
int64_t last_packed = 0;
std::mutex packing;

// Best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#ifdef LORAPLEX_X86
  for (auto each : {kernels_avx512(), kernels_avx2()})
    if (each) found.push_back(each);
#endif
  found.push_back(kernels_generic());
  return found;
}

const Kernels* kernels = available().front();

Element element(at::ScalarType type) {
  switch (type) {
    case at::kBFloat16: return BF16;
    case at::kHalf: return FP16;
    case at::kFloat: return FP32;
    default: TORCH_CHECK(false, "adapters are applied in bf16, fp16 or fp32, not in ", type);
  }
}

// --- state ------------------------------------------------------------------------------------

int64_t new_batch() {
  batches.emplace_back();
  return int64_t(batches.size()) - 1;
}

int64_t new_layer(int64_t slots, int64_t batch) {
  layers.push_back({batch, std::vector<Packed>(slots)});
  return int64_t(layers.size()) - 1;
}

// Copies of plain loops and not of torch's: those would start threads that the step needs.
template <typename T>
void copy(T* to, const T* from, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  for (auto i : c10::irange(rows)) {
    if (column == 1) {
      std::memcpy(to + i * columns, from + i * row, columns * sizeof(T));
      continue;
    }
    for (auto j : c10::irange(columns)) to[i * columns + j] = from[i * row + j * column];
  }
}

// `from` [rows, columns] of any strides, to `to` [rows, columns] without gaps.
void copy(char* to, const at::Tensor& from) {
  auto source = from.const_data_ptr();
  auto rows = from.size(0), columns = from.size(1), row = from.stride(0), column = from.stride(1);
  if (from.itemsize() == 2)
    copy(reinterpret_cast<int16_t*>(to), static_cast<const int16_t*>(source), rows, columns, row,
         column);
  else
    copy(reinterpret_cast<int32_t*>(to), static_cast<const int32_t*>(source), rows, columns, row,
         column);
}

int64_t pack(at::TensorList a, at::TensorList b, at::IntArrayRef outputs) {
  TORCH_CHECK(!a.empty() && a.size() == b.size() && a.size() == outputs.size(),
              "A, B and a first output for each slice");
  auto w = std::make_shared<Weights>();
  auto options = a[0].options();
  element(a[0].scalar_type());
  for (auto i : c10::irange(a.size())) {
    TORCH_CHECK(a[i].dim() == 2 && b[i].dim() == 2 && a[i].size(0) == b[i].size(0) &&
                    a[i].size(1) == a[0].size(1),
                "A ", a[i].sizes(), " and B ", b[i].sizes(), " do not fit each other");
    TORCH_CHECK(a[i].scalar_type() == a[0].scalar_type() &&
                    b[i].scalar_type() == a[0].scalar_type(),
                "A and B of different types");
    w->rank += a[i].size(0);
  }
  w->a = at::empty({w->rank, a[0].size(1)}, options);
  auto size = w->a.itemsize();
  auto to = static_cast<char*>(w->a.mutable_data_ptr());
  int64_t first = 0;
  for (auto i : c10::irange(a.size())) {
    auto rank = a[i].size(0), width = b[i].size(1);
    copy(to, a[i]);
    to += a[i].numel() * size;
    auto panels = at::empty({b[i].numel()}, options);
    auto panel = static_cast<char*>(panels.mutable_data_ptr());
    for (int64_t o = 0; o < width; o += PANEL) {
      auto some = b[i].narrow(1, o, std::min(PANEL, width - o));
      copy(panel, some);
      panel += some.numel() * size;
    }
    w->slices.push_back({panels, first, rank, outputs[i], width});
    first += rank;
    w->outputs += b[i].numel();
    w->end = std::max(w->end, outputs[i] + width);
  }
  std::lock_guard lock(packing);
  packed[++last_packed] = std::move(w);
  return last_packed;
}

void free(at::IntArrayRef numbers) {
  std::vector<Packed> last;  // given back to the system after the lock, which a step may wait for
  std::lock_guard lock(packing);
  for (auto number : numbers) {
    auto found = packed.find(number);
    if (found == packed.end()) continue;
    last.push_back(std::move(found->second));
    packed.erase(found);
  }
}

void set_slot(int64_t layer, int64_t slot, int64_t number) {
  Packed weights;
  if (number) {
    std::lock_guard lock(packing);
    weights = packed.at(number);
  }
  layers.at(layer).slots.at(slot) = std::move(weights);
}

int64_t packed_bytes() {
  std::lock_guard lock(packing);
  int64_t bytes = 0;
  for (auto& [number, w] : packed) bytes += (w->a.numel() + w->outputs) * w->a.itemsize();
  return bytes;
}

void set_rows(int64_t batch, const at::Tensor& rows, at::IntArrayRef slots,
              at::IntArrayRef counts) {
  TORCH_CHECK(rows.scalar_type() == at::kInt && rows.is_contiguous(), "rows are int32");
  Batch next;
  next.rows.assign(rows.const_data_ptr<int32_t>(), rows.const_data_ptr<int32_t>() + rows.numel());
  int64_t first = 0;
  for (auto i : c10::irange(slots.size())) {
    next.groups.push_back({slots[i], first, counts.at(i)});
    first += counts[i];
  }
  TORCH_CHECK(first == rows.numel(), "groups of ", first, " rows, but ", rows.numel(), " given");
  for (auto row : next.rows) next.last_row = std::max(next.last_row, row);
  batches.at(batch) = std::move(next);
}

// --- the op -----------------------------------------------------------------------------------

struct Task {  // some rows of one group
  const Weights* weights;
  const int32_t* rows;
  int64_t count;
  float* h;
};

class Call {
 public:
  Call(at::Tensor& y, const at::Tensor& x)
      : type_(element(y.scalar_type())), y_(y), x_(x) {}

  void shrink(const Task& task, int64_t first, int64_t last) const {
    auto& a = task.weights->a;
    auto start = static_cast<const char*>(a.const_data_ptr()) + first * a.size(1) * a.itemsize();
    kernels->shrink[type_](x_.const_data_ptr(), x_.stride(0), task.rows, task.count, start,
                           a.size(1), last - first, task.h + first, task.weights->rank);
  }

  // `first` is a multiple of PANEL.
  void expand(const Task& task, const Slice& slice, int64_t first, int64_t last) const {
    auto size = y_.itemsize();
    auto y = static_cast<char*>(y_.mutable_data_ptr()) + slice.first_output * size;
    auto b = static_cast<const char*>(slice.panels.const_data_ptr());
    for (int64_t o = first; o < last; o += PANEL) {
      int64_t width = std::min(PANEL, slice.width - o);
      kernels->expand[type_](y + o * size, y_.stride(0), task.rows, task.count,
                             task.h + slice.first_rank, task.weights->rank,
                             b + o * slice.rank * size, width, slice.rank, width);
    }
  }

  void both(const Task& task) const {
    shrink(task, 0, task.weights->rank);
    for (auto& slice : task.weights->slices) expand(task, slice, 0, slice.width);
  }

 private:
  Element type_;
  at::Tensor& y_;
  const at::Tensor& x_;
};

// Few rows, much rank: each product is cut across its outputs, with all threads between the two.
void split_each(const Call& call, const std::vector<Task>& tasks) {
  struct Piece {
    const Task* task;
    const Slice* slice;
    int64_t first, last;
  };
  auto run = [](const std::vector<Piece>& pieces, auto&& f) {
    at::parallel_for(0, int64_t(pieces.size()), 1, [&](int64_t begin, int64_t end) {
      for (auto i : c10::irange(begin, end)) f(pieces[i]);
    });
  };
  auto cut = [](std::vector<Piece>& pieces, const Task& task, const Slice* slice, int64_t total,
                int64_t step) {
    for (int64_t first = 0; first < total; first += step)
      pieces.push_back({&task, slice, first, std::min(first + step, total)});
  };
  std::vector<Piece> ranks, outputs;
  for (auto& task : tasks) {
    cut(ranks, task, nullptr, task.weights->rank, 8);
    for (auto& slice : task.weights->slices) cut(outputs, task, &slice, slice.width, 3 * PANEL);
  }
  run(ranks, [&](const Piece& p) { call.shrink(*p.task, p.first, p.last); });
  run(outputs, [&](const Piece& p) { call.expand(*p.task, *p.slice, p.first, p.last); });
}

void add_lora(at::Tensor& y, const at::Tensor& x, int64_t layer_index) {
  const Layer& layer = layers.at(layer_index);
  const Batch& batch = batches.at(layer.batch);
  if (batch.groups.empty()) return;
  TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) &&
                  batch.last_row < x.size(0),
              "x ", x.sizes(), " and y ", y.sizes(), " do not fit each other, or the step's ",
              batch.last_row + 1, " rows");
  if (x.size(1) != 1 && x.stride(1) != 1) return add_lora(y, x.contiguous(), layer_index);
  if (y.size(1) != 1 && y.stride(1) != 1) {
    at::Tensor copy = y.contiguous();
    add_lora(copy, x, layer_index);
    y.copy_(copy);
    return;
  }

  std::vector<Task> tasks;
  int64_t scratch = 0, work = 0;
  for (auto& group : batch.groups) {
    auto weights = layer.slots.at(group.slot).get();
    if (!weights || weights->rank == 0) continue;
    const Weights& w = *weights;
    auto type = w.a.scalar_type();
    TORCH_CHECK(w.a.size(1) == x.size(1) && w.end <= y.size(1) && x.scalar_type() == type &&
                    y.scalar_type() == type,
                "an adapter for ", w.a.size(1), " inputs and ", w.end, " outputs in ", type,
                " on x ", x.sizes(), " in ", x.scalar_type(), " and y ", y.sizes(), " in ",
                y.scalar_type());
    for (int64_t done = 0; done < group.count; done += BLOCK) {
      int64_t count = std::min(BLOCK, group.count - done);
      tasks.push_back({&w, batch.rows.data() + group.first + done, count, nullptr});
      scratch += count * w.rank;
      work += std::max<int64_t>(count, 4) * (w.a.numel() + w.outputs);
    }
  }
  if (tasks.empty()) return;
  static thread_local std::vector<float> buffer;
  if (int64_t(buffer.size()) < scratch) buffer.resize(scratch);
  float* h = buffer.data();
  for (auto& task : tasks) {
    task.h = h;
    h += task.count * task.weights->rank;
  }

  Call call(y, x);
  int64_t threads = at::get_num_threads(), count = int64_t(tasks.size());
  if (threads == 1 || work < WORTH_A_THREAD) {
    for (auto& task : tasks) call.both(task);
  } else if (count < threads) {
    split_each(call, tasks);
  } else {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (auto i : c10::irange(begin, end)) call.both(tasks[i]);
    });
  }
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (auto each : available()) names.push_back(each->name);
  return names;
}

void use_instruction_set(std::string name) {
  for (auto each : available())
    if (each->name == name) kernels = each;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) {
  m.def("new_batch() -> int", new_batch);
  m.def("new_layer(int slots, int batch) -> int", new_layer);
  m.def("pack(Tensor[] a, Tensor[] b, int[] outputs) -> int", pack);
  m.def("free(int[] packed) -> ()", free);
  m.def("packed_bytes() -> int", packed_bytes);
  m.def("set_slot(int layer, int slot, int packed) -> ()", set_slot);
  m.def("set_rows(int batch, Tensor rows, int[] slots, int[] counts) -> ()", set_rows);
  m.def("instruction_sets() -> str[]", instruction_sets);
  m.def("use_instruction_set(str name) -> ()", use_instruction_set);
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) { m.impl("add_lora", add_lora); }

}  // namespace loraplex
