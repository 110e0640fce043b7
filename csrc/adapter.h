// One adapter for both front ends: it turns what torch.ops or Python passes into what the operations of ops.h take.
#pragma once
#include <array>
#include <tuple>
#include <utility>

#include "ops.h"

namespace sam {

// A front end has In<P>, the type in which it passes an argument for a parameter of type P; Held<P>, made from that and
// the argument's name, which converts to P and lives as long as the call; and Running, which lives while the operation
// runs.
template <class Front, auto op>
struct Call;

template <class Front, class R, class... P, R (*op)(const Hook&, P...)>
struct Call<Front, op> {
  using Names = std::array<const char*, sizeof...(P)>;

  static R run(typename Front::template In<P>... args) { return with({}, {}, args...); }

  static R with(const Hook& hook, const Names& names, typename Front::template In<P>... args) {
    return [&]<size_t... I>(std::index_sequence<I...>) {
      const std::tuple<typename Front::template Held<P>...> held(typename Front::template Held<P>{args, names[I]}...);
      const typename Front::Running running;
      return op(hook, std::get<I>(held)...);
    }(std::index_sequence_for<P...>());
  }
};

}  // namespace sam
