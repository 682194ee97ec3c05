"""The peer's mirror: qemu-storage-daemon is told over its monitor what to do."""
import json
import os
import socket
import subprocess
import tempfile

from host import MiB, Failure, wait_until


class Monitor:
    def __init__(self, connection):
        self.lines = connection.makefile('rw')
        self.wait_for('QMP')
        self.ask('qmp_capabilities')

    def wait_for(self, word):
        """A kind of answer, or the name of an event."""
        for line in self.lines:
            message = json.loads(line)
            if 'error' in message or message.get('data', {}).get('error'):
                raise Failure('qemu-storage-daemon says ' + line)
            if word in message or message.get('event') == word:
                return
        raise Failure('qemu-storage-daemon ended without ' + word)

    def ask(self, command, **arguments):
        self.lines.write(json.dumps({'execute': command, 'arguments': arguments}) + '\n')
        self.lines.flush()
        self.wait_for('return')


def blockdev_mirror(source, target, format):
    """Mirrors an idle disk, from the program's start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        path = folder + '/qmp'
        daemon = subprocess.Popen([
            'qemu-storage-daemon', '--blockdev', 'driver=file,node-name=f,filename=%s' % source,
            '--blockdev', 'driver=qcow2,node-name=s,file=f',
            '--blockdev', 'driver=file,node-name=g,discard=unmap,filename=%s' % target,
            '--blockdev', 'driver=%s,node-name=t,discard=unmap,file=g' % format,
            '--chardev', 'socket,id=c,path=%s,server=on,wait=off' % path, '--monitor', 'chardev=c'])
        try:
            wait_until(lambda: os.path.exists(path), 'the monitor')
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(path)
                monitor = Monitor(connection)
                monitor.ask('blockdev-mirror', **{'job-id': 'm', 'device': 's', 'target': 't', 'sync': 'full',
                                                  'granularity': 65536, 'buf-size': 16 * MiB})
                monitor.wait_for('BLOCK_JOB_READY')
                monitor.ask('block-job-cancel', device='m')
                monitor.wait_for('BLOCK_JOB_COMPLETED')
        finally:
            daemon.terminate()
            daemon.wait(30)
