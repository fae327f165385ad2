/** Bugs planted in the engine, and the cargo tests that must catch each. Every `find` stands exactly once in its file. */
import type { PlantedBug } from './planted-bug.ts'

const deviceTests = ['-p', 'atoll-engine', 'device::']

export const nativeBugs: PlantedBug[] = [
  {
    name: 'the batch log is believed under another boot of the kernel',
    edits: [
      { file: 'native/engine/src/device/batch_log.rs', find: '            && bytes[8..24] == self.place.boot_id\n', replace: '' },
      {
        file: 'native/engine/src/device/batch_log.rs',
        find: 'crc32c::crc32c_append(boot_crc, &entry[4..])',
        replace: '{\n        let _ = boot_crc;\n        crc32c::crc32c(&entry[4..])\n    }',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'the batch log is believed although another home had the volume since',
    edits: [
      {
        file: 'native/engine/src/device/batch_log.rs',
        find: '(since_epoch..self.epoch).contains',
        replace: '(since_epoch.min(0)..self.epoch).contains',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'a change is answered before it is in the batch log',
    edits: [
      {
        file: 'native/engine/src/device/batch_log.rs',
        find: '*must_flush |= *is_retired || log.write(taken).is_err();',
        replace: '*must_flush |= *is_retired;\n        let _ = BatchLog::write;',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'what waits for the batch log goes to the place of an older batch',
    edits: [
      {
        file: 'native/engine/src/device/batch_log.rs',
        find: '                waiting.bytes.clear();\n',
        replace: '',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'what somebody else could not keep counts as kept',
    edits: [
      {
        file: 'native/engine/src/device/batch_log.rs',
        find: ' && (since >= mine || !log.is_behind.load(Ordering::SeqCst))',
        replace: '',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'writes are answered together before they are settled',
    edits: [{ file: 'native/engine/src/nbd/serve.rs', find: '        self.settle(batch);\n', replace: '' }],
    tests: ['-p', 'atoll-engine', 'nbd::'],
  },
  {
    name: 'flush closes the batch after the data sync',
    edits: [
      {
        file: 'native/engine/src/device/flush.rs',
        find: '        self.dirty_bytes.store(0, Ordering::Relaxed);\n',
        replace:
          '        self.dirty_bytes.store(0, Ordering::Relaxed);\n        if let Some(active) = &self.layers.load().active {\n            let _ = active.io.sync();\n        }\n',
      },
      {
        file: 'native/engine/src/device/flush.rs',
        find: '|| layer.io.sync());',
        replace: '|| atoll_io::Result::Ok(()));',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'flush appends the frame without syncing the data',
    edits: [
      {
        file: 'native/engine/src/device/flush.rs',
        find: '|| layer.io.sync());',
        replace: '|| atoll_io::Result::Ok(()));',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'second flush is answered by the one that runs already',
    edits: [
      {
        file: 'native/engine/src/device/flush.rs',
        find: 'let mine = turns.started + 1;',
        replace: 'let mine = turns.started.max(1);',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'second flush skips a batch whose frame failed',
    edits: [
      {
        file: 'native/engine/src/device/flush.rs',
        find: '                    if let Some(front) = self.batch.lock().queue.front_mut() {\n                        front.deltas = deltas;\n                    }\n',
        replace: '                    self.batch.lock().queue.pop_front();\n                    drop(deltas);\n',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'flush leaves out the layer that a swap closed',
    edits: [
      {
        file: 'native/engine/src/device/flush.rs',
        find: 'for (index, layer) in layers.iter().enumerate() {',
        replace: 'for (index, layer) in layers.iter().enumerate().skip(closing_count) {',
      },
    ],
    tests: deviceTests,
  },
  {
    name: "the successor's frames go before those of the closing layer",
    edits: [
      {
        file: 'native/engine/src/device/flush.rs',
        find: 'for (index, layer) in layers.iter().enumerate() {',
        replace: 'for (index, layer) in layers.iter().enumerate().rev() {',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'the owner changes before the data is written',
    edits: [
      {
        file: 'native/engine/src/device/write.rs',
        find: '            if offset_bytes.is_multiple_of(SLOT_BYTES) &&',
        replace:
          '            self.change_owner(active, runs, alias)?;\n            if offset_bytes.is_multiple_of(SLOT_BYTES) &&',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'a merge without the slot lock',
    edits: [
      { file: 'native/engine/src/device/write.rs', find: 'let _lock = self.ranges.lock(start_slot, end_slot);', replace: '' },
    ],
    tests: deviceTests,
  },
  {
    name: 'a partial first write to a hole keeps what the active layer happens to hold',
    edits: [
      {
        file: 'native/engine/src/device/write.rs',
        find: 'let complete_head = head_length > 0 && first_owner != alias;',
        replace: 'let complete_head = head_length > 0 && first_owner != alias && first_owner != atoll_map::HOLE;',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'the store that a volume is leaving is not asked any more whether it is ours',
    edits: [
      {
        file: 'native/engine/src/device/mod.rs',
        find: 'self.checkpoints.lock().swap.as_ref().map(|swap| swap.predecessor.clone());',
        replace: 'None::<Arc<ActiveLayer>>;',
      },
    ],
    tests: ['-p', 'atoll-engine', 'nbd::tests::moving'],
  },
  {
    name: 'the journal of the next layer is looked for in the store of another one',
    edits: [
      {
        file: 'native/engine/src/device/open.rs',
        find: 'Ok(Journal::replay(layer.store.clone(), identity, after_lsn)?)',
        replace: 'Ok(Journal::replay(spec.layers[0].store.clone(), identity, after_lsn)?)',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'what was copied into a replica is not compared',
    edits: [
      {
        file: 'native/engine/src/fill.rs',
        find: 'if XxHash3_128::oneshot(own) != check.hash {',
        replace: 'if own.len() != check.length {',
      },
    ],
    tests: ['-p', 'atoll-engine', 'fill::'],
  },
  {
    name: 'what was copied into a replica is not synced',
    edits: [
      {
        file: 'native/engine/src/fill.rs',
        find: 'let synced = self.target.sync().and_then(|()| {',
        replace: 'let synced = atoll_io::Result::Ok(()).and_then(|()| {',
      },
    ],
    tests: ['-p', 'atoll-engine', 'fill::'],
  },
  {
    name: 'no drain at the swap',
    edits: [
      {
        file: 'native/engine/src/device/swap.rs',
        find: 'closed.iter().all(|closed| closed.drain(started + deadline))',
        replace: 'closed.iter().all(|closed| closed.drain(started) || true)',
      },
      { file: 'native/engine/src/device/swap.rs', find: '        predecessor.refuse_writes();\n', replace: '' },
    ],
    tests: deviceTests,
  },
  {
    name: 'a swap forgets the open batch',
    edits: [{ file: 'native/engine/src/device/swap.rs', find: '        batch.close(&predecessor);\n', replace: '' }],
    tests: deviceTests,
  },
  {
    name: 'open does not look into the prepared layer',
    edits: [
      {
        file: 'native/engine/src/device/open.rs',
        find: 'Some(next) => replay_next(&spec, &map, find_layer(&spec, next)?, &mut recalled, &mut report)?,',
        replace: 'Some(_) => Option::<Arc<ActiveLayer>>::None,',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'a device goes on after a failed sync',
    edits: [
      {
        file: 'native/engine/src/device/flush.rs',
        find: 'return Err(self.poison(&format!("sync of layer {} failed: {error}", layer.spec.id)));',
        replace: 'return Err(error.into());',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'a shrink leaves the map as it is',
    edits: [
      {
        file: 'native/engine/src/device/resize.rs',
        find: 'if first_slot < MAP_SLOTS\n',
        replace: 'if first_slot > MAP_SLOTS\n',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'orphans are freed without the slot lock',
    edits: [
      {
        file: 'native/engine/src/device/resize.rs',
        find: '                let _lock = self.ranges.lock(at, until);\n',
        replace: '',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'a checkpoint removes the segment of frames it does not cover',
    edits: [
      {
        file: 'native/engine/src/device/checkpoint.rs',
        find: 'journal.remove_behind(lsn)?;',
        replace: 'journal.remove_behind(lsn + 1)?;',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'the next frame goes behind the zeros that a segment grew ahead by',
    edits: [
      {
        file: 'native/io/src/journal/writer.rs',
        find: 'last.length_bytes = end_bytes;',
        replace: 'let _ = end_bytes;\n            last.length_bytes = padded_bytes;',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'bytes of a torn frame are taken for the zeros of a segment that grew ahead',
    edits: [
      {
        file: 'native/io/src/journal/replay.rs',
        find: '(self.good_bytes < self.length_bytes && !self.is_tail_zero)',
        replace: 'false',
      },
    ],
    tests: ['-p', 'atoll-io', '--test', 'journal'],
  },
  {
    name: 'a discard of a slot that another layer owns only punches',
    edits: [{ file: 'native/engine/src/device/discard.rs', find: 'self.change_owner(active, runs, HOLE)', replace: 'Ok(())' }],
    tests: deviceTests,
  },
  {
    name: 'what was discarded since a snapshot is not told to who backs up',
    edits: [
      {
        file: 'native/engine/src/device/status.rs',
        find: 'if run.owner == base_run.owner { 0 }',
        replace: 'if run.owner == base_run.owner || run.owner == HOLE { 0 }',
      },
    ],
    tests: deviceTests,
  },
  {
    name: 'a fast zero is taken for ranges whose edges have to be written',
    edits: [
      {
        file: 'native/engine/src/device/discard.rs',
        find: ' && length_bytes.is_multiple_of(unit_bytes)',
        replace: ' && length_bytes > 0',
      },
    ],
    tests: ['-p', 'atoll-engine', 'nbd::'],
  },
  {
    name: 'a write that a cluster lost is taken for done',
    edits: [
      { file: 'native/engine/src/device/begun.rs', find: '            result?;\n', replace: '            let _ = result;\n' },
    ],
    tests: ['-p', 'atoll-engine', 'nbd::tests::begun'],
  },
  {
    name: 'a swap does not wait for writes that a cluster carries out',
    edits: [
      {
        file: 'native/engine/src/device/begun.rs',
        find: '            write.inside = Some(pass.keep());\n',
        replace: '            drop(pass);\n',
      },
    ],
    tests: ['-p', 'atoll-engine', 'nbd::tests::begun'],
  },
  {
    name: 'writes of a cluster are answered before they are settled',
    edits: [
      {
        file: 'native/engine/src/nbd/begun.rs',
        find: 'if let Err(error) = self.device.settle(mark) {',
        replace: 'if let Err(error) = Ok::<_, crate::EngineError>(drop(mark)) {',
      },
    ],
    tests: ['-p', 'atoll-engine', 'nbd::tests::begun'],
  },
  {
    name: 'a daemon that was shut out answers a flush that has nothing to write',
    edits: [
      {
        file: 'native/engine/src/device/flush.rs',
        find: 'Device::prove_stores(&written, proved, |store| store.is_fenceable)?;',
        replace: 'let _ = (&written, proved);',
      },
    ],
    tests: ['-p', 'atoll-engine', 'nbd::tests::begun'],
  },
]
