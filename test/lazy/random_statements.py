# Owner(s): ["oncall: jit"]

"""What random programs are made of: statements, inputs, results, and the world around them.

In a statement, {v} is a new variable; {x}, {y}, {z} are tensors that are there, {g}, {h} ones that
require grad, where any does; {c} is a number, {d} a dimension. The simplest of each kind come
first: that is what a failure shrinks to.
"""

import textwrap

POINTWISE = """
    {v} = {x} + {y}
    {v} = {x} * {c}
    {v} = {x} + 1
    {v} = -{x}
    {v} = {x} - {y}
    {v} = {x} * {y}
    {v} = {x} / ({y} + 2)
    {v} = {x} * n
    {v} = {x} > {c}
    {v} = {x} == {y}
    {v} = ~{x}
    {v} = {x} & {y}
    {v} = {x}.exp()
    {v} = {x}.sin()
    {v} = {x}.tanh()
    {v} = {x}.abs().sqrt()
    {v} = {x}.pow(2)
    {v} = {x} // 2
    {v} = {x} % 3
    {v} = {x}.round()
    {v} = {x}.clamp(min={c})
    {v} = F.relu({x})
    {v} = F.gelu({x})
    {v} = torch.sigmoid({x})
    {v} = torch.maximum({x}, {y})
    {v} = torch.where({x} > {c}, {x}, {y})
    {v} = torch.where({x} > {y}, {c}, {x})
    {v} = torch.lerp({x}, {y}, 0.5)
    {v} = torch.addcmul({x}, {y}, {z})
    {v} = {x}.to({dtype})
    {v} = {x}.to({y}.dtype)
    {v} = {x}.to({y})
    {v} = {x}.to(torch.float64, copy=True)
    {v} = {x}.nan_to_num().clamp(-9, 9).to(torch.int64)
    {v} = {x}.bool()
    {v} = {x}.float()
    {v} = {x}.clone()
    {v} = {x}.contiguous()
    {v} = {x}.clone(memory_format=torch.preserve_format)
    {v} = torch.zeros_like({x})
    {v} = torch.full_like({x}, {c})
    {v} = torch.ones(2, 3)
    {v} = torch.arange(3)
    {v} = torch.tensor([{c}, 1.0, 2.0])
    {v} = {x}.new_zeros(2)
    {v} = torch.polar({x}.abs(), {y})
    {v} = torch.view_as_complex(torch.stack([{x}, {y}], -1))
    {v} = {x}.conj()
    {v} = {x}.conj() * {y}
    {v} = {x}.resolve_conj()
    {v} = {x}.masked_fill({x} > {c}, 0)
    {v} = {x} @ {y}
    {v} = {x}.matmul({y}.mT)
    {v} = F.softmax({x}, {d})
    {v} = F.layer_norm({x}, {x}.shape[-1:])
    {v} = F.linear({x}, {y})
    {v} = F.one_hot({x}.abs() % 4, 4)
"""
VIEWS = """
    {v} = {x}.detach()
    {v} = {x}[0]
    {v} = {x}.t()
    {v} = {x}.view(-1)
    {v} = {x}[1:]
    {v} = {x}[::2]
    {v} = {x}[..., 0]
    {v} = {x}[..., 1:]
    {v} = {x}[..., None]
    {v} = {x}[None]
    {v} = {x}[-1]
    {v} = {x}.mT
    {v} = {x}.transpose(0, -1)
    {v} = {x}.reshape(-1)
    {v} = {x}.flatten()
    {v} = {x}.unsqueeze({d})
    {v} = {x}.squeeze()
    {v} = {x}.squeeze(0)
    {v} = {x}.expand(2, *{x}.shape)
    {v} = {x}.expand_as({y})
    {v} = {x}.expand(-1, 3)
    {v} = {x}.diagonal()
    {v} = {x}.unfold({d}, 2, 1)
    {v} = {x}.narrow({d}, 0, 1)
    {v} = {x}.select({d}, -1)
    {v} = {x}.movedim(0, -1)
    {v} = {x}.view(*{x}.shape, 1)
    {v} = {x}.view_as({y})
    {v} = {x}.as_strided((2,), (1,), {x}.storage_offset())
    {v} = {x}.as_strided((2, 2), (1, 1))
    {v} = {x}.view(torch.int32)
    {v} = {x}.view(torch.uint8)
    {v} = {x}.data
    {v} = {x}.real
    {v} = {x}.imag
    {v} = torch.view_as_real({x})
    {v} = {x}.split(1)[-1]
    {v} = {x}.chunk(2, {d})[0]
    {v} = {x}.unbind({d})[0]
    {v} = torch.broadcast_tensors({x}, {y})[0]
    {v} = torch.atleast_2d({x})
    {v} = {x}.to({x}.dtype)
    {v} = {x}.alias() if False else {x}
"""
MUTATIONS = """
    {x}.add_({y})
    {x}.add_(1)
    {x}.mul_({c})
    {x}.zero_()
    {x}.fill_({c})
    {x}.copy_({y})
    {x} += {y}
    {x} *= 2
    {x}[0] = {y}
    {x}[0] = {c}
    {x}[...] = {y}
    {x}[..., 0] += 1
    {x}[1:] = {x}[:-1].clone()
    {x}[..., 1:].mul_(2)
    {x}[{x} > {c}] = 0
    {x}[{x} > {c}] += 1
    {x}[torch.tensor([0, 0])] = {y}
    {x}.data.add_(1)
    {x}.detach().mul_(2)
    {x}.t_()
    {x}.unsqueeze_({d})
    {x}.squeeze_()
    {x}.transpose_(0, -1)
    {x}.neg_()
    {x}.exp_()
    {x}.sin_()
    {x}.clamp_(min={c})
    {x}.clamp_(max={c})
    {x}.masked_fill_({x} > {c}, {c})
    {x}.masked_fill_({y} > {c}, {c})
    {x}.index_fill_(0, torch.tensor([0]), {c})
    {x}.index_add_(0, torch.tensor([0]), {y}[:1])
    {x}.index_copy_(0, torch.tensor([0]), {y}[:1])
    {x}.index_put_((torch.tensor([0, 0]),), {y}[0], accumulate=True)
    {x}.scatter_(0, torch.zeros_like({x}, dtype=torch.int64), {c})
    {x}.scatter_add_(0, torch.zeros_like({x}, dtype=torch.int64), {y})
    {x}.cumsum_(0)
    {x}.lerp_({y}, 0.5)
    {x}.addcmul_({y}, {z})
    {x}.logical_not_()
    {x}.eq_({y})
    {x}.div_(2)
    {x}.floor_divide_(2)
    {x}.sub_({y}.t())
    {x}.copy_({x}.flip(0))
    {x}.fill_diagonal_({c})
    {x}.tril_()
    {x}.conj_physical_()
    torch.add({x}, {y}, out={z})
    torch.sin({x}, out={y})
    torch.cat([{x}, {y}], out={z})
    torch.sum({x}, 0, out={y})
    F.relu({x}, inplace=True)
    F.relu_({x})
    torch._foreach_add_([{x}, {y}], 1)
    torch._foreach_mul_([{x}, {y}], [{z}, {z}])
    {x}.set_({y})
    {x}.swapaxes_(0, -1)
    {x}.squeeze_(0)
    {x}.data = {x} * 2
    {x}.data = {y}
"""
REDUCTIONS = """
    {v} = {x}.sum()
    {v} = {x}.mean()
    {v} = {x}.sum({d})
    {v} = {x}.max()
    {v} = {x}.amax({d}, keepdim=True)
    {v} = {x}.argmax()
    {v} = {x}.max({d})[1]
    {v} = {x}.min({d}).values
    {v} = {x}.prod()
    {v} = {x}.var({d})
    {v} = {x}.norm()
    {v} = {x}.any()
    {v} = {x}.all({d})
    {v} = {x}.logsumexp({d})
    {v} = {x}.cumsum({d})
    {v} = {x}.cumprod({d})
    {v} = {x}.sort({d})[0]
    {v} = {x}.argsort({d}, stable=True)
    {v} = {x}.topk(1, {d})[0]
    {v} = {x}.median()
    {v} = {x}.sum(dtype=torch.float64)
    {v} = torch.count_nonzero({x})
    {v} = torch.var_mean({x}, {d})[1]
    {v} = torch.cummax({x}, {d}).values
    {v} = torch.einsum("i...,i...->...", {x}, {y})
    {v} = torch.aminmax({x}).max
    {v} = F.mse_loss({x}, {y})
"""
INDEXING = """
    {v} = {x}[[0, 0]]
    {v} = {x}[torch.tensor([1, 0])]
    {v} = {x}[:, torch.tensor([1, 0])]
    {v} = {x}[{x} > {c}]
    {v} = {x}[{y}]
    {v} = {x}[{y} > {c}]
    {v} = {x}[{x}.argmax(0)]
    {v} = {x}[{y}.long().abs() % 2]
    {v} = {x}.masked_select({y} > {c})
    {v} = {x}.nonzero()
    {v} = torch.where({x})[0]
    {v} = {x}.unique()
    {v} = {x}.unique(return_counts=True)[1]
    {v} = torch.bincount({x}.flatten().abs())
    {v} = torch.repeat_interleave({x}, {y}.flatten().abs())
    {v} = {x}.index_select({d}, torch.tensor([0]))
    {v} = {x}.gather({d}, {x}.argsort({d}))
    {v} = {x}.take(torch.tensor([0, 1]))
    {v} = {x}.take_along_dim({x}.argmax({d}, keepdim=True), {d})
    {v} = torch.cat([{x}, {y}])
    {v} = torch.cat([{x}, {x}], -1)
    {v} = torch.stack([{x}, {y}])
    {v} = {x}.flip(0)
    {v} = {x}.roll(1, {d})
    {v} = {x}.repeat(2, 1)
    {v} = {x}.tile(2)
    {v} = {x}.tril()
    {v} = {x}.diag()
    {v} = F.pad({x}, (1, 0))
    {v} = F.embedding({x}.long().abs() % 2, {y})
    {v} = torch.searchsorted({x}.flatten().sort()[0], {y})
"""
RANDOM = """
    {v} = torch.rand(2, 3)
    {v} = torch.randn_like({x})
    {v} = torch.rand_like({x})
    {v} = torch.randint(0, 5, (2, 3))
    {v} = torch.randint_like({x}, 3)
    {v} = torch.randperm(3)
    {v} = torch.bernoulli(torch.full_like({x}, 0.5))
    {v} = torch.normal({x}, 1.0)
    {v} = torch.multinomial({x}.abs().flatten() + 1, 2)
    {v} = F.dropout({x}, 0.5, training=True)
    {v} = F.rrelu({x}, training=True)
    {x}.uniform_()
    {x}.normal_()
    {x}.random_(0, 5)
    {x}.bernoulli_(0.5)
    {x}.exponential_()
    F.dropout({x}, 0.5, training=True, inplace=True)
    {x}[0].normal_()
    torch.rand(3)
    torch.rand(2, 3, out={x})
"""
STATE = """
    {v} = self.s
    self.s = {x}
    self.s += 1
    self.s.add_({x})
    self.s = self.s + {x}
    self.s = {x}[0]
    self.t = {x}
    {v} = self.t
    {v} = self.s[0]
    self.s.copy_({x})
    self.s[0] = {x}
    self.l[0] = {x}
    self.l[1] = self.l[0]
    {v} = self.l[0]
    {v} = self.l[1] * 2
    self.l.append({x})
    self.l.pop()
    self.l[0].add_(1)
    self.l = [{x}, {y}]
    self.l.reverse()
    self.d["k"] = {x}
    {v} = self.d["k"]
    self.d = {{"k": {x}, "m": self.s}}
    self.d.pop("k", None)
    self.n += 1
    self.n = 2
    {v} = {x} * self.n
    self.s, self.t = self.t, self.s
    del self.t
    self.s.data = {x}
    self.s = {x}.view(-1)
"""
VALUES = """
    k = int({x}.sum() > {c})
    {v} = {x} * k
    {v} = {x}[k:]
    {v} = {x}[k]
    k = {x}.long().sum().item() % 3
    k = {x}.abs().tolist()
    k = len({x}[{x} > {c}])
    k = float({x}.max())
    k = bool({x}.any())
    k = {x}.numpy().shape
    k = {x}.numpy().tolist()
    k = {x}.numpy().sum().item()
    k = str({x})
    k = f"{{{x}.sum()}}"
    k = {x}.shape[0]
    k = ({x}.stride(), {x}.is_contiguous(), {x}.dtype)
    k = torch.equal({x}, {y})
    k = torch.allclose({x}, {y})
    k = {x}.is_nonzero()
    k = {x} is {y}
    k = {x}.data_ptr() == {y}.data_ptr()
    k = n
    k = {x}.numpy()
    {v} = torch.full((2,), k)
    {v} = torch.tensor([k, {x}.max()])
    {v} = torch.from_numpy({x}.numpy().copy())
    assert {x}.sum() < 100
    k = [{x}, {y}]
    k = ({x}, [{y}], {{"a": {x}}})
    {v} = torch.zeros(int(({x} > {c}).sum()))
    {v} = {x}._version * {y}
    del {x}
    {v} = {x}
    {x} = {y}
"""
# `k` is a number or something made of one, mostly.
SCALARS = """
    k = {x}.sum().item()
    k = {x}.mean().item()
    k = {x}.double().max().item()
    k = {x}.flatten()[0].item()
    k = {x}.norm().item() * 2 - n
    k = {x}.sum().item() + {y}.sum().item()
    k = k + {c}
    k = {c} - k
    k = k * 2
    k = k / 4
    k = 1 / k
    k = k ** 2
    k = 2 ** k
    k = -k
    k = +k
    k = abs(k)
    k = k // 2
    k = 7 // k
    k = k % 2
    k = divmod(k, 2)
    k = int(k)
    k = float(k)
    k = complex(k)
    k = round(k)
    k = round(k, 1)
    k = math.floor(k)
    k = math.ceil(k)
    k = math.trunc(k)
    k = math.sqrt(abs(k))
    k = math.exp(k)
    k = math.isnan(k)
    k = math.copysign(1.0, k)
    k = math.fsum([k, 1.5])
    k = max(k, {c})
    k = min(0.5, k)
    k = sum([k, 1.5])
    k = sorted([k, {c}, 0.5])
    k = k > {c}
    k = {c} <= k
    k = k == {c}
    k = k == k
    k = not k
    k = 0 < k < 2
    k = k in (0, {c})
    k = k or {c}
    k = isinstance(k, float)
    k = type(k).__name__
    k = hash(k)
    k = k.is_integer()
    k = k.as_integer_ratio()
    k = k.conjugate()
    k = k.real
    k = str(k)
    k = repr(k)
    k = f"{{k:.2f}}"
    k = "%.1f %s" % (k, k)
    k = [k, k + 1]
    k = (k, [k], {{"k": k}})
    k = {{k: 1}}
    k = numpy.float64(k)
    k = numpy.array([k, 1.0])
    k = self.n * k
    self.n = k
    self.d["n"] = k
    {v} = {x} * k
    {v} = k * {x}
    {v} = k - {x}
    {v} = {x} / (k + 10)
    {v} = k / ({x} + 10)
    {v} = {x} ** k
    {v} = k ** {x}
    {v} = {x} // k
    {v} = {x} % k
    {v} = {x} > k
    {v} = {x} == k
    {v} = k < {x}
    {v} = {x}.clamp(max=k)
    {v} = {x}.clamp(-1, k)
    {v} = {x}.add({y}, alpha=k)
    {v} = torch.sub({x}, k)
    {v} = torch.pow({x}, k)
    {v} = torch.lerp({x}, {y}, k)
    {v} = torch.addcmul({x}, {y}, {z}, value=k)
    {v} = torch.where({x} > {c}, k, {x})
    {v} = torch.full((2,), k)
    {v} = torch.full_like({x}, k)
    {v} = {x}.new_full((2,), k)
    {v} = torch.tensor(k)
    {v} = torch.tensor([k, 1])
    {v} = torch.tensor([[k], [{x}.sum().item()]])
    {v} = torch.tensor(k, dtype={dtype})
    {v} = torch.as_tensor(k)
    {v} = torch.asarray([k])
    {v} = torch.scalar_tensor(k)
    {v} = {x}.new_tensor(k)
    {v} = {x}.new_tensor([k, 2])
    {v} = torch.linspace(0, k, 3)
    {v} = torch.arange(0, abs(k) % 5)
    {v} = {x}.masked_fill({x} > {c}, k)
    {v} = F.leaky_relu({x}, k)
    {v} = F.pad({x}, (1, 0), value=k)
    {v} = F.dropout({x}, min(abs(k), 1) / 2)
    {v} = {x}[int(k):]
    {v} = {x}.repeat(abs(int(k)) % 3, *{x}.shape)
    {x}.fill_(k)
    {x}.mul_(k)
    {x}.add_({y}, alpha=k)
    {x}.clamp_(min=k)
    {x} += k
    {x}[0] = k
    {x}[{x} > {c}] = k
    {x}.masked_fill_({x} > {c}, k)
    torch.add({x}, k, out={y})
    torch._foreach_add_([{x}, {y}], k)
"""
# Take the statements that follow as their bodies.
COMPOUND = """
    if {x}.sum() > {c}:|
    if {x}.sum() > {c}:|else:|
    for _ in range(2):|
    for _ in range(4):|    {x} = {x} / 2|    if not {x}.abs().max() > 2: break
    if n > 2:|else:|
    try:|except RuntimeError:|
    for i in range(int({x}.abs().max()) % 3):|
    for r in {x}:|    {v} = r + 1
    with torch.no_grad():|
    if ({x} > {y}).any() and {x}.mean() < {c}:|else:|
    if self.n > 2:|else:|
    if {x}.isnan().any():|
    if k:|
    if k > {c}:|else:|
    for _ in range(int(abs(k)) % 3):|
    while k > 2:|    k = k / 2
"""


# ------------------------------------------------- gradients and Python state: the wide programs

WORLD = """
FLAG = 1
TABLE = {"k": 2}
VAR = contextvars.ContextVar("VAR", default=1)
config = types.ModuleType("config")
config.ratio = 2


def set_flag(value):
    global FLAG
    FLAG = value


def helper(t, scale=2):
    return t * scale + helper.bonus


helper.bonus = 1


def other_helper(t, scale=3):
    return t - scale


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t

    @staticmethod
    def backward(ctx, g):
        return g * 2


class View(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        ctx.shape = t.shape
        return t.view(-1)

    @staticmethod
    def backward(ctx, g):
        return g.view(ctx.shape) * 3


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        ctx.mark_dirty(t)
        return t.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return g * 2


class Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, u):
        ctx.save_for_backward(t, u)
        return t * u, t + 1

    @staticmethod
    def backward(ctx, g, h):
        t, u = ctx.saved_tensors
        return g * u + h, (g * t if ctx.needs_input_grad[1] else None)


class State:
    scale = 2
    shared = [1, 2]

    def __init__(self):
        self.s = torch.ones(2, 3)
        self.t = torch.zeros(3)
        self.l = [torch.ones(3), self.s]
        self.d = {"k": torch.ones(2)}
        self.n = 1
        self.w = nn.Parameter(torch.full((2, 3), 0.5))
        self.b = nn.Parameter(torch.ones(3))
        self.q = torch.full((3,), 2.0, requires_grad=True)
        self.m = nn.Linear(3, 3)
        with torch.no_grad():
            self.m.weight.copy_(torch.arange(9.0).view(3, 3) / 4 - 1)
            self.m.bias.fill_(0.5)
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.mask = None
        self.log = []
        self.seen = {1, 2}
        self.arr = array.array("d", [1.0, 2.0])
        self.dq = collections.deque([1, 2], maxlen=3)
        self.od = collections.OrderedDict(a=1, b=2)
        self.count = collections.Counter(a=1)
        self.cfg = types.SimpleNamespace(k=1)

    def method(self, t):
        return t * self.scale

    def other_method(self, t):
        return t + self.scale

    @property
    def doubled(self):
        return self.scale * 2
"""
HOOKS = """
    {g}.register_hook(lambda g: g * 2)
    {g}.retain_grad()
    self.w.register_hook(lambda g: g + 1)
    {g}.register_hook(lambda g: None)
    {g}.register_hook(lambda g: g * 2).remove()
    {g}.register_hook(lambda g, log=self.log: log.append(tuple(g.shape)))
    self.w.register_post_accumulate_grad_hook(lambda p: torch._foreach_mul_([p.grad], 2))
    {v} = nn.Parameter({x}.detach() * 1); {v}.register_hook(lambda g: g * 2)
    {v} = self.w * 1; {v}.register_hook(lambda g: g * 3)
    self.m.register_forward_hook(lambda m, a, o: o * 2)
    self.m.register_forward_pre_hook(lambda m, a: (a[0] + 1,))
"""
GRADIENTS = """
    ({x} * self.w).sum().backward()
    {g}.sum().backward()
    {g}.sum().backward(retain_graph=True)
    ({x} * self.w).sum().backward(inputs=[self.w])
    ({g} * self.b).sum().backward(inputs=[self.b, self.q])
    {v} = torch.autograd.grad(({x} * self.w).sum(), self.w)[0]
    {v} = torch.autograd.grad((self.w * self.w).sum() * {x}.sum(), self.w, create_graph=True)[0]
    {v} = torch.autograd.grad(({x} * self.b).sum(), [self.w, self.b], allow_unused=True)[1]
    {v} = torch.autograd.grad({g}.sum(), [self.w, self.b], allow_unused=True, materialize_grads=True)[0]
    {v} = torch.autograd.grad({g}.pow(2).sum(), {h}, create_graph=True)[0]
    {v} = torch.autograd.grad({g}.sum(), {h}, retain_graph=True)[0]
    {v} = torch.autograd.grad({g}, {h}, torch.ones_like({g}), allow_unused=True)[0]
    k = torch.autograd.grad({g}.sum(), [self.w, self.q], allow_unused=True)[1] is None
    {v} = torch.autograd.grad({g}.sin().sum(), self.q, create_graph=True, allow_unused=True)[0]
    self.w.grad = None
    self.b.grad = torch.zeros_like(self.b)
    {v} = self.w.grad
    k = self.b.grad is None
    self.w.grad.zero_()
    {v} = torch.func.grad(lambda t: (t * t).sum())({x})
    {v} = torch.func.vmap(lambda t: t * 2)({x})
    {v} = torch.func.jacrev(lambda t: t * t)({x})
    {v} = torch.autograd.functional.jvp(lambda t: t * t, {x}, torch.ones_like({x}))[1]
    {v} = (self.m({x}) ** 2).mean()
    torch.optim.SGD([self.w, self.b], lr=0.5).step()
    self.w.data.sub_(0.5)
"""
GRAD_MODES = """
    with torch.no_grad():|
    with torch.enable_grad():|
    with torch.no_grad():|    with torch.enable_grad():|        {v} = {g} * 2
    with torch.set_grad_enabled({c} > 0):|
    with torch.inference_mode():|
    with torch.autocast("cpu", dtype=torch.bfloat16):|
    with torch.autocast("cpu", enabled=False):|
    with torch.autocast("cpu", dtype=torch.float16):|    {v} = {g} @ self.m.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):|    {v} = self.m({x})
    with torch.autocast("cpu", enabled=False):|    {v} = self.m({x})
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):|
    with torch.random.fork_rng(devices=[]):|
    if torch.is_grad_enabled():|else:|
    if {g}.requires_grad:|else:|
    if {x}.is_leaf:|else:|
    if {g}.grad_fn is None:|else:|
    if self.mask is not None:|else:|
    if self.training_flag if hasattr(self, "training_flag") else FLAG > 1:|else:|
    if VAR.get() > 1:|else:|
    if {c} in self.seen:|else:|
    for e in self.dq:|    {v} = {x} * e|
    for e in sorted(self.seen):|    {v} = {x} + e|
    torch.set_grad_enabled(False)
    torch.set_grad_enabled(True)
"""
LEAVES = """
    {v} = {x}.detach().requires_grad_()
    {v} = {x}.detach().clone().requires_grad_()
    {v} = nn.Parameter({x}.detach().clone())
    {v} = torch.ones(2, 3, requires_grad=True)
    {v} = torch.tensor([1.0, {c}, 2.0], requires_grad=True)
    {v} = {x} * self.w
    {v} = {x} * self.q
    {v} = {x} + self.b
    {v} = self.m({x})
    {v} = self.m({x}[..., :3].view(-1, 3))
    {v} = self.norm({x})
    {v} = self.drop({x})
    {v} = self.w[0]
    {v} = self.w.view(-1)
    {v} = self.w.detach()
    {x}.requires_grad_()
    {x}.requires_grad_(False)
    {x}.detach_()
    self.s.requires_grad_()
    self.w.requires_grad_(False)
    self.q.requires_grad_(False)
    self.w = nn.Parameter({x}.detach().clone())
    self.b = nn.Parameter(torch.zeros(3))
    {v} = copy.deepcopy(self.w)
    {v} = copy.copy({x})
    {v} = copy.deepcopy({x})
    {v} = copy.deepcopy(self.m)({x})
    k = ({x}.requires_grad, {x}.is_leaf, {x}.grad_fn is None, {x}._base is None)
    k = {g}.retains_grad
    {v} = nn.utils.parameters_to_vector([self.w, self.b])
    nn.utils.vector_to_parameters({x}.detach().reshape(-1)[:9], [self.w, self.b])
    {v} = nn.utils.stateless.functional_call(self.m, {{"bias": self.b}}, ({x},))
    {g}.mul_(2)
    {g}.data.add_(1)
    {g}[0] = 0
    {g}.view(-1).mul_(2)
    {g}.detach().add_(1)
    {v} = {g}.clone(); {v}.mul_({h})
    {v} = {g} * 1; {v}[..., 0] = {c}
    {v} = {g}.t()
    {v} = {g}[0]
    {v} = {g}.expand(2, *{g}.shape)
    {v} = {g}.squeeze().unsqueeze(0)
    {v} = torch.cat([{g}, {h}])
    {v} = torch.where({g} > {c}, {g}, {h})
    with torch.no_grad(): self.w.add_({c})
    with torch.no_grad(): self.b.copy_({x})
"""
PYTHON = """
    {v} = {x} * self.scale
    {v} = {x} * FLAG
    {v} = {x} * TABLE["k"]
    {v} = helper({x})
    {v} = {x} + VAR.get()
    {v} = self.method({x})
    {v} = {x} * config.ratio
    {v} = {x} * self.doubled
    {v} = {x} * self.arr[0]
    {v} = {x} * self.dq[-1]
    {v} = {x} + len(self.seen)
    {v} = {x} * self.cfg.k
    {v} = {x} * State.shared[0]
    type(self).scale = {c}
    self.scale = {c}
    set_flag({c})
    TABLE["k"] = {c}
    TABLE["t"] = {x}
    {v} = TABLE["t"] * 1
    helper.bonus = {c}
    helper.note = {c}
    k = getattr(helper, "note", 0)
    VAR.set({c})
    config.ratio = {c}
    self.seen.add({c})
    self.seen.discard({c})
    k = {c} in self.seen
    k = sorted(self.seen)
    k = len(self.seen)
    self.seen |= {{7}}
    self.arr.append({c})
    self.arr[0] = {c}
    k = list(self.arr)
    self.dq.append({c})
    self.dq.appendleft({c})
    k = list(self.dq)
    k = self.dq.popleft()
    self.dq.rotate(1)
    self.cfg.k = {c}
    self.cfg.t = {x}
    k = self.cfg.k
    self.od.move_to_end("a")
    k = list(self.od)
    self.od["c"] = {c}
    self.count["a"] += 1
    k = self.count["z"]
    k = self.count.most_common(1)
    State.shared.append({c})
    k = len(State.shared)
    self.log.append({c})
    self.log.append({x}.shape)
    {x}.tag = {c}
    k = getattr({x}, "tag", 0)
    self.s.tag = {c}
    k = getattr(self.s, "tag", 0)
    it = iter([1, 2, 3]); next(it); k = next(it)
    it = itertools.count(3); next(it); k = next(it)
    k = sum(i for i in range(3))
    k = [int(i) for i in self.arr]
    k = max(self.dq)
    k = list(map(lambda e: e + 1, self.dq))
    k = list(zip(self.dq, self.arr))
    k = list(enumerate(self.seen))
    k = next(iter(self.dq))
    k = {{**TABLE}}.keys() >= {{"k"}}
    k = functools.reduce(lambda a, b: a + b, self.arr)
    f = lambda t, c={c}: t * c + FLAG; {v} = f({x})
    k = (lambda: self.n)()
    self.f = lambda t: t + 1; {v} = self.f({x})
    k = hasattr(self, "late")
    self.late = {c}
    del self.late
    k = type(self).__name__
    k = self.m.training
    k = vars(self.cfg)["k"]
    k = torch.is_grad_enabled()
    k = torch.get_default_dtype()
    k = self.s.dtype
    k = self.t.shape
    k = self.w.requires_grad
    k = self.mask is None
    k = self.s.is_contiguous()
    k = id(self.s) == id({x})
    k = {{id(self.s): 1}}.get(id({x}), 0)
"""
FUNCTIONS = """
    {v} = Same.apply({g})
    {v} = View.apply({g})
    {v} = Saves.apply({g}, {h})[0]
    {v} = Saves.apply({g}, {x})[1]
    {v} = Dirty.apply({g} * 1)
    {v} = Dirty.apply({x})
    {v} = Same.apply({x})
    {v} = checkpoint(lambda t: t.sin() * 2, {g}, use_reentrant=False)
    {v} = checkpoint(lambda t: t.sin() * 2, {g}, use_reentrant=True)
    {v} = checkpoint(self.m, {x}, use_reentrant=False)
    {v} = checkpoint(lambda t: F.dropout(t, 0.5), {g}, use_reentrant=False)
    {v} = F.gelu(self.m({x}))
    {v} = F.layer_norm({g}, {g}.shape[-1:], self.b)
    {v} = F.batch_norm({x}, self.norm.running_mean, self.norm.running_var, self.b, training=True)
    {v} = F.dropout({g}, 0.5)
    {v} = F.mse_loss({g}, {h})
    {v} = {g}.cumprod(-1)
    {v} = {g}.softmax(-1)
    {v} = {g}.abs().sqrt()
    {v} = {g}.max(-1).values
    {v} = {g} @ self.m.weight
    {v} = {g}.pow(2).sum()
    {v} = {g}.std()
    {v} = torch.einsum("...i,i->...", {g}, self.b)
"""
# The world changes between the calls: `p` is the program, the rest are names of its module.
CHANGES = """
    p.n += 1
    type(p).scale = 5
    p.scale = 4
    globals()["FLAG"] = 3
    TABLE["k"] = 4
    VAR.set(5)
    config.ratio = 7
    helper.bonus = 9
    helper.__defaults__ = (6,)
    globals()["helper"] = other_helper
    type(p).method = type(p).other_method
    p.method = lambda t: t - 1
    p.seen.add(9)
    p.arr[0] = 8.0
    p.dq.append(6)
    p.cfg.k = 3
    p.od["a"] = 5
    p.count["a"] = 3
    State.shared[0] = 6
    p.mask = torch.ones(1)
    p.s.tag = 3
    p.w.requires_grad_(False)
    p.q.requires_grad_(False)
    p.s.requires_grad_()
    p.b = nn.Parameter(torch.full((3,), 2.0))
    p.w.data = torch.full((2, 3), -1.0)
    p.w.register_hook(lambda g: g * 2)
    p.q.register_hook(lambda g: p.log.append("hook"))
    p.w.register_post_accumulate_grad_hook(lambda w: torch._foreach_add_([w.grad], 1))
    p.w.grad = torch.ones(2, 3)
    p.w.grad = None
    p.m.register_forward_hook(lambda m, a, o: o * 2)
    p.m.bias = None
    p.norm.eval()
    p.drop.eval()
    p.drop.p = 0.25
    p.s = torch.ones(3)
    p.s = torch.ones(2, 3, dtype=torch.float64)
    p.t = torch.full((3,), 2.0)
    p.l.append(p.t)
    p.l[0] = torch.full((3,), 4.0)
    p.d["k"] = torch.full((2,), 3.0)
    p.d["new"] = 1
    p.s.t_()
    p.m.double()
    p.w = p.q
    p.f = lambda t: t * 2
    p.late = 3
    p.training_flag = True
"""


# What is around the calls, and what is made of their results.
AMBIENT = (
    "contextlib.nullcontext()",
    "contextlib.nullcontext()",
    "contextlib.nullcontext()",
    "torch.no_grad()",
    "torch.inference_mode()",
    'torch.autocast("cpu", dtype=torch.bfloat16)',
    "contextlib.nullcontext() if i < 3 else torch.no_grad()",
    'torch.autocast("cpu", dtype=torch.float16) if i > 1 else contextlib.nullcontext()',
)


def _lines(templates: str) -> list[str]:
    return textwrap.dedent(templates).strip().splitlines()


GROUPS = [
    _lines(t)
    for t in (
        POINTWISE,
        MUTATIONS,
        VIEWS,
        REDUCTIONS,
        INDEXING,
        RANDOM,
        STATE,
        VALUES,
        SCALARS,
        COMPOUND,
    )
]
WIDE_GROUPS = [
    *GROUPS[:-1],
    *(_lines(t) for t in (HOOKS, GRADIENTS, GRAD_MODES, LEAVES, PYTHON, FUNCTIONS)),
    GROUPS[-1],
]
CHANGES_OF_WORLD = _lines(CHANGES)
# How often each group is drawn; views and mutations are where the difficulties are.
DRAWN = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 4, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9]
# The same of the wide ones: hooks, gradients, modes, leaves, Python state and functions first.
WIDE_DRAWN = [12, 12, 12, 13, 13, 13, 13, 10, 10, 10, 11, 11, 9, 9, 14, 14, 0, 0, 1, 2, 3, 6, 7, 15]
DTYPES = ("float32", "float64", "int64", "bool", "float16", "bfloat16", "complex64", "int32")
WIDE_DTYPES = ("float32",) * 6 + ("float64", "int64")
SHAPES = ((2, 3), (3,), (), (2, 2), (1, 3), (2, 1, 3), (0, 3), (4,))
WIDE_SHAPES = ((2, 3), (3,), (2, 3), (3, 3), (), (1, 3))
NUMBERS = (0, 1, -1, 0.5, 2, 3)

# How an input lies in memory. {a} is an earlier input, {f} a fresh tensor.
FRESH = (
    "{f}",
    "{f}.t()",
    "{f}.repeat_interleave(2, -1)[..., ::2]",
    "torch.cat([{f}, {f}])[1:]",
    "{f}.expand(2, *{f}.shape)",
    "{f}.flip(0)",
)
ALIASED = (
    "{a}",
    "{a}[0]",
    "{a}.t()",
    "{a}[..., 1:]",
    "{a}.detach()",
    "{a}.view(-1)",
    "{a}.view(-1)[1:]",
    "{a}[1:]",
    "torch.from_numpy({a}.numpy())",
)
RETURNS = (
    "return {x}",
    "return {x}, {y}",
    "return [{x}, {y}, k]",
    "return {{'x': {x}, 'l': [{y}, {z}], 'k': k}}",
    "return {x}, ({x}, {y}), n",
    "return {x}[:1], {x}",
    "return k",
    "return {x}.t(), {y}, {z}.view(-1)",
)
WIDE_RETURNS = (
    "return {g}",
    "return {g}, {x}",
    "return {g}, {h}, {x}",
    "return {g}.sum()",
    "return [{g}, {x}, k]",
    "return {{'x': {g}, 'l': [{x}, {h}], 'k': k}}",
    "return {g}[:1], {g}",
    "return {g}, self.w, n",
    "return {g}.view(-1), {g}.detach()",
    "return ({x} * 1, ({g}, {g}))",
    "return iter([{g}, {x}])",
    "return (t * 2 for t in [{g}])",
    "return lambda: {g} * 2",
    "return functools.partial(torch.mul, {g}, 2)",
    "return zip([{g}], [{x}])",
    "return {{1, k}} if isinstance(k, int) else {g}",
    "return collections.OrderedDict(a={g}, b=k)",
    "return collections.deque([{g}, {x}])",
    "return types.SimpleNamespace(a={g}, k=k)",
    "return k",
)
