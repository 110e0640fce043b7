// The maths of SAM and of its base optimizers, one element at a time: the one place where it is written down.
// Every backend runs these functors. Scalars are prepared in double and rounded once to the arithmetic type A.
#pragma once
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "scalars.h"

namespace sam {

// One row of `ascent`: how the parameters of a group are perturbed. rho is negative for a group that maximises its
// objective, whose loss is the negative: the ascent of that goes against the gradient.
struct Ascent {
  double rho, eta, adaptive;
};

// T of SAM (1) or of ASAM (|w| + eta), the norm's term T g, and the perturbed weight w + rho T^2 g / norm.
template <class A, bool kAdaptive>
struct Ascend {
  A eta, scale;
  uint32_t seed;
  SAM_FN explicit Ascend(const Ascent& a, double norm = 0)
      : eta(static_cast<A>(a.eta)),
        scale(static_cast<A>(a.rho / (norm + 1e-12))),
        seed(hashed(bits_of(static_cast<float>(norm)))) {}
  SAM_FN A scaled(A w, A g) const { return kAdaptive ? (std::abs(w) + eta) * g : g; }
  SAM_FN A perturbed(A w, A g) const {
    if constexpr (!kAdaptive) return w + scale * g;
    const A t = std::abs(w) + eta;
    return w + scale * t * (t * g);  // t * t alone may overflow
  }
  // `w` from element i of its tensor, which it may be itself. Of most 16-bit weights, eps is less than half a unit in
  // the last place, and rounding to nearest would lose it. So these are stochastically rounded, which keeps it on
  // average. The random bits are a hash of the norm and i: it needs no state, differs from step to step, and a run
  // repeats itself.
  template <class T>
  SAM_FN void perturb(T& w, T from, A g, uint32_t i) const {
    const A x = perturbed(load(from), g);
    if constexpr (sizeof(T) == 2)
      store_randomly(w, x, hashed(seed + i));
    else
      store(w, x);
  }
};

// Sums over the groups of ||T g||^2 to grad_norm = ||T g|| and the first-order sharpness
// sum |rho| ||T g||^2 / grad_norm (Proposition 1 of the paper when every group has the same rho).
struct Sharpness {
  double sq = 0, weighted = 0;
  SAM_FN void add(double sq_norm, double rho) {
    sq += sq_norm;
    weighted += std::abs(rho) * sq_norm;
  }
  // out = {grad_norm, sharpness, norm of the gradients as they are}, the first two divided by *grad_scale unless that
  // is null; a finite sharpness is added to total = {sum, count}, unless that is null.
  SAM_FN void report(const float* grad_scale, double* total, double* out) const {
    const double norm = std::sqrt(sq), value = norm == 0 ? 0 : weighted / norm;
    const double scale = grad_scale ? *grad_scale : 1;
    out[0] = norm / scale;
    out[1] = value / scale;
    out[2] = norm;
    if (total && std::isfinite(value)) {
      total[0] += out[1];
      total[1] += 1;
    }
  }
};

// ---- base optimizers ----
// A base has its hyper-parameters, a row of doubles in the order of its entry in sam_fused/bases.py, with the learning
// rate first; how many state tensors it has, and whether it counts steps. Its Step is what the step count decides, made
// once for each count; Update<A> is made once a chunk, and called once an element with the weight, the gradient and the
// element's states.

// Of a base on which the step count has no bearing.
struct NoStep {
  template <class Hyper>
  SAM_FN NoStep(const Hyper&, double /*count*/) {}
};

// What a gradient is multiplied by.
template <class Hyper>
SAM_FN double gain_of(const Hyper& h, double grad_scale) {
  return (h.maximize != 0 ? -1 : 1) / grad_scale;
}

// torch.optim.SGD, without dampening.
template <bool kMomentum>
struct SgdBase {
  static constexpr const char* name = kMomentum ? "sgd_momentum" : "sgd";
  static constexpr int states = kMomentum;
  static constexpr bool counts_steps = false;

  struct Hyper {
    double lr, weight_decay, maximize, momentum, nesterov;
  };

  using Step = NoStep;

  template <class A>
  struct Update {
    A lr, weight_decay, gain, momentum;
    bool nesterov;
    SAM_FN Update(const Hyper& h, const Step&, double grad_scale)
        : lr(static_cast<A>(h.lr)),
          weight_decay(static_cast<A>(h.weight_decay)),
          gain(static_cast<A>(gain_of(h, grad_scale))),
          momentum(static_cast<A>(h.momentum)),
          nesterov(h.nesterov != 0) {}
    SAM_FN void operator()(A& w, A g, A* state) const {
      g = gain * g;
      if (weight_decay != 0) g += weight_decay * w;
      if constexpr (kMomentum) {
        state[0] = momentum * state[0] + g;
        g = nesterov ? g + momentum * state[0] : state[0];
      }
      w -= lr * g;
    }
  };
};
using Sgd = SgdBase<false>;
using SgdMomentum = SgdBase<true>;

// torch.optim.Adam and AdamW.
// States: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
template <bool kAmsgrad>
struct AdamBase {
  static constexpr const char* name = kAmsgrad ? "adam_amsgrad" : "adam";
  static constexpr int states = kAmsgrad ? 3 : 2;
  static constexpr bool counts_steps = true;

  struct Hyper {
    double lr, weight_decay, maximize, beta1, beta2, eps, decoupled_weight_decay;
  };

  struct Step {  // the bias corrections
    double correction1, sqrt_correction2;
    SAM_FN Step(const Hyper& h, double count)
        : correction1(1 - std::pow(h.beta1, count)), sqrt_correction2(std::sqrt(1 - std::pow(h.beta2, count))) {}
  };

  template <class A>
  struct Update {
    A decay, weight_decay, gain, lerp, beta2, one_minus_beta2, eps, step_size, inv_sqrt_correction2;
    bool from_avg;
    SAM_FN Update(const Hyper& h, const Step& step, double grad_scale) {
      const bool decoupled = h.decoupled_weight_decay != 0;
      decay = static_cast<A>(decoupled ? 1 - h.lr * h.weight_decay : 1);
      weight_decay = static_cast<A>(decoupled ? 0 : h.weight_decay);
      gain = static_cast<A>(gain_of(h, grad_scale));
      from_avg = 1 - h.beta1 < 0.5;
      lerp = static_cast<A>(from_avg ? 1 - h.beta1 : -h.beta1);
      beta2 = static_cast<A>(h.beta2);
      one_minus_beta2 = static_cast<A>(1 - h.beta2);
      eps = static_cast<A>(h.eps);
      step_size = static_cast<A>(h.lr / step.correction1);
      inv_sqrt_correction2 = static_cast<A>(1 / step.sqrt_correction2);
    }
    SAM_FN void operator()(A& w, A g, A* state) const {
      g = gain * g;
      w *= decay;
      if (weight_decay != 0) g += weight_decay * w;
      // exp_avg = beta1 exp_avg + (1 - beta1) g, from the nearer end, as torch.lerp does
      state[0] = (from_avg ? state[0] : g) + lerp * (g - state[0]);
      state[1] = beta2 * state[1] + one_minus_beta2 * g * g;
      A v = state[1];
      if constexpr (kAmsgrad) v = state[2] = state[2] < v || v != v ? v : state[2];
      w -= step_size * state[0] / (std::sqrt(v) * inv_sqrt_correction2 + eps);
    }
  };
};
using Adam = AdamBase<false>;
using AdamAmsgrad = AdamBase<true>;

// torch.optim.RMSprop. States: square_avg, and with kMomentum momentum_buffer, with kCentered grad_avg.
template <bool kMomentum, bool kCentered>
struct RmspropBase {
  static constexpr const char* name = kMomentum ? (kCentered ? "rmsprop_momentum_centered" : "rmsprop_momentum")
                                                : (kCentered ? "rmsprop_centered" : "rmsprop");
  static constexpr int states = 1 + kMomentum + kCentered;
  static constexpr bool counts_steps = true;  // which nothing but the state's "step" depends on

  struct Hyper {
    double lr, weight_decay, maximize, alpha, eps, momentum;
  };

  using Step = NoStep;

  template <class A>
  struct Update {
    A lr, weight_decay, gain, alpha, one_minus_alpha, eps, momentum;
    SAM_FN Update(const Hyper& h, const Step&, double grad_scale)
        : lr(static_cast<A>(h.lr)),
          weight_decay(static_cast<A>(h.weight_decay)),
          gain(static_cast<A>(gain_of(h, grad_scale))),
          alpha(static_cast<A>(h.alpha)),
          one_minus_alpha(static_cast<A>(1 - h.alpha)),
          eps(static_cast<A>(h.eps)),
          momentum(static_cast<A>(h.momentum)) {}
    SAM_FN void operator()(A& w, A g, A* state) const {
      g = gain * g;
      if (weight_decay != 0) g += weight_decay * w;
      state[0] = alpha * state[0] + one_minus_alpha * g * g;
      A v = state[0];
      if constexpr (kCentered) {
        A& avg = state[1 + kMomentum];
        avg = alpha * avg + one_minus_alpha * g;
        v -= avg * avg;
      }
      A step = g / (std::sqrt(v) + eps);
      if constexpr (kMomentum) step = state[1] = momentum * state[1] + step;
      w -= lr * step;
    }
  };
};

// The registry: ops look a base up by its name, backends by its place here.
using Bases = std::tuple<Sgd, SgdMomentum, Adam, AdamAmsgrad, RmspropBase<false, false>, RmspropBase<true, false>,
                         RmspropBase<false, true>, RmspropBase<true, true>>;
constexpr int kMaxStates = []<class... Base>(std::tuple<Base...>*) {
  return std::max({Base::states...});
}(static_cast<Bases*>(nullptr));

// Calls f(Base{}) for the base at `index` of Bases.
template <class F>
void with_base(int index, F&& f) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    ((static_cast<int>(I) == index ? f(std::tuple_element_t<I, Bases>{}) : void()), ...);
  }(std::make_index_sequence<std::tuple_size_v<Bases>>{});
}

}  // namespace sam
