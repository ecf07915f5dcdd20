"""PyTorch as a side of benchmarks/peers.py, eager or compiled."""

import torch
import torch_detection
from torch._inductor import config as inductor_config
from torch_network import Network
from worker import Task, serve, trimmed


def prepare(task: Task):
  torch.set_num_threads(task.threads)
  torch.backends.cudnn.benchmark = True
  torch.set_float32_matmul_precision('high')  # TF32 on a GPU, as XLA and cuDNN have it.
  network = Network(task.weights, task.spec).to(task.device, memory_format=torch.channels_last)
  images = torch.from_numpy(task.images).to(task.device)
  anchors = torch.from_numpy(task.anchors).to(task.device)
  return (_train if task.kind == 'train' else _infer)(task, network, images, anchors)


def _compiled(task: Task, function):
  mode = task.options.get('compile')
  if not mode:
    return function
  if task.device == 'cpu' and task.kind != 'train':
    # Makes the weights constants, which are packed for oneDNN with batch norm folded in.
    inductor_config.freezing = True
  return torch.compile(function, mode=mode)


def _autocast(task: Task):
  return torch.autocast(task.device, torch.bfloat16, enabled=task.dtype == 'bfloat16')


def _wait(task: Task) -> None:
  if task.device == 'cuda':
    torch.cuda.synchronize()


def _train(task: Task, network: Network, images: torch.Tensor, anchors: torch.Tensor):
  network.train()
  spec = task.spec
  ground_truth = {name: torch.from_numpy(a).to(task.device)
                  for name, a in trimmed(task.ground_truth).items()}
  ground_truth['labels'] = ground_truth['labels'].long()
  kernels = [p for name, p in network.named_tensors() if name.endswith('kernel')]
  others = [p for p in network.parameters() if not any(p is k for k in kernels)]
  optimizer = torch.optim.SGD(
      [{'params': kernels, 'weight_decay': spec['weight_decay']}, {'params': others}],
      lr=spec['learning_rate'], momentum=spec['momentum'], fused=True)

  def loss_of(images, ground_truth):
    with _autocast(task):
      codes, logits = network(images)
    return torch_detection.objective(codes, logits, anchors, ground_truth, spec)

  compiled, last = _compiled(task, loss_of), None
  penalty = 0.5 * spec['weight_decay'] * sum(float(k.detach().square().sum()) for k in kernels)

  def once():
    nonlocal last
    optimizer.zero_grad(set_to_none=True)
    last = compiled(images, ground_truth)
    last.backward()
    optimizer.step()
    _wait(task)

  return once, lambda: {'loss': last.item() + penalty, **network.export()}


def _infer(task: Task, network: Network, images: torch.Tensor, anchors: torch.Tensor):
  network.eval()
  # torch.compile folds batch norm itself when it freezes the weights.
  if task.options.get('fold', True) and not (task.options.get('compile') and task.device == 'cpu'):
    network.fold()
    network.to(memory_format=torch.channels_last)

  def outputs_of(images):
    with _autocast(task):
      return network(images)

  compiled, last = _compiled(task, outputs_of), None

  def once():
    nonlocal last
    # Freezing supports only no_grad; the two cost the same.
    with torch.no_grad() if task.options.get('compile') else torch.inference_mode():
      last = compiled(images)
      if task.kind == 'detect':
        last = torch_detection.detect(*last, anchors, task.spec)
    _wait(task)

  names = (('boxes', 'scores', 'labels', 'valid') if task.kind == 'detect'
           else ('box_codes', 'class_logits'))
  return once, lambda: {name: x.cpu().numpy() for name, x in zip(names, last, strict=True)}


def describe() -> dict:
  memory = ({'device_peak_bytes': torch.cuda.max_memory_allocated()}
            if torch.cuda.is_available() else {})
  versions = {'torch': torch.__version__}
  if torch_detection.nms:
    import torchvision
    versions['torchvision'] = torchvision.__version__
  return {'versions': versions, 'memory': memory,
          'nms': 'torchvision.ops.nms' if torch_detection.nms else 'in PyTorch'}


if __name__ == '__main__':
  serve(prepare, describe)
