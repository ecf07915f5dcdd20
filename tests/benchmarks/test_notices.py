"""Flags and the stand-in for the metadata server of benchmarks/notices.py, without training."""

import http.client
import pathlib
import sys

import pytest
from time_limits import wait_until

from ppn_jax.distributed import preemption
from ppn_jax.distributed.preemption import PreemptionNotice

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'))
import notices


@pytest.mark.parametrize('flag', ['--notices=sigkill', '--moments=step,lunch'])
def test_bad_flags_are_reported_with_code_2(flag, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['notices.py', flag])
  with pytest.raises(SystemExit) as e:
    notices.main()
  assert e.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize('notice', ['preempted', 'maintenance'])
def test_a_run_heeds_the_stand_in(notice, monkeypatch):
  with notices.metadata_server() as (address, values):
    monkeypatch.setenv('GCE_METADATA_HOST', address)
    monkeypatch.setenv('NO_GCE_CHECK', 'false')
    monkeypatch.setattr(preemption, '_POLL_SECONDS', 0.01)
    asked = []
    notices_of = preemption.MaintenanceWatch._notices
    monkeypatch.setattr(preemption.MaintenanceWatch, '_notices',
                        lambda self: asked.append(True) or notices_of(self))
    with PreemptionNotice() as given:
      wait_until(lambda: len(asked) > 2)  # Notices from before the start do not count.
      assert not given.given()
      connection = http.client.HTTPConnection(address)
      connection.request('POST', f'/{notice}')
      assert connection.getresponse().status == 200
      connection.close()
      wait_until(given.given)
  assert values
