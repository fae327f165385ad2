//! A device whose layers go from one store to another while clients use it.
use super::postponed_store::PostponedStore;
use super::*;
use crate::LayerSpec;
use atoll_io::{LayerId, MemoryStore, Store};
use std::sync::atomic::{AtomicBool, Ordering};

const SLOT: u64 = 4096;
const LONG: Duration = Duration::from_secs(300);

fn layer(alias: u8, store: &Arc<dyn Store>) -> LayerSpec {
    LayerSpec { alias: u32::from(alias), id: LayerId([alias; 16]), store: store.clone() }
}

/// A cluster beside the store of the world, in which no answer goes out without a proof.
fn cluster() -> Arc<PostponedStore> {
    let store = PostponedStore::new(Arc::new(MemoryStore::new(u64::MAX, false)));
    store.want_proofs();
    Arc::new(store)
}

/// Swaps onto a new layer. The layer above has not committed that yet.
fn swap(world: &World, alias: u8, store: &Arc<dyn Store>) {
    let next = layer(alias, store);
    store.create_layer(next.id).unwrap();
    Device::swap(&[(world.device.clone(), next)], LONG).unwrap();
}

fn commit(world: &World, first_page_id: u64) {
    let checkpoint = world.device.checkpoint(first_page_id).unwrap().unwrap();
    world.device.checkpoint_committed(checkpoint, true).unwrap();
    world.device.swap_committed(true).unwrap();
}

#[test]
fn a_volume_that_comes_to_a_cluster_is_proven_from_its_first_answer_there_and_no_more_when_it_has_left() {
    let world = world();
    let cluster = cluster();
    let (distant, local): (Arc<dyn Store>, Arc<dyn Store>) = (cluster.clone(), world.faults.clone());
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
    assert!(!world.device.waits_for_network());
    assert_eq!(cluster.proof_count(), 0);

    swap(&world, 2, &distant);
    assert!(world.device.waits_for_network());
    let cookie = client.send(WRITE, 0, SLOT, SLOT, &[2; 4096]);
    cluster.wait_begun(1);
    cluster.end_at(SLOT);
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (cookie, 0), "{}", answer.message);
    assert!(cluster.proof_count() > 0);
    commit(&world, 1);

    // Not committed: the catalog still says that the layer in the cluster is written, so whoever has that has the volume.
    swap(&world, 3, &local);
    let before = cluster.proof_count();
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert!(cluster.proof_count() >= before + 2, "each flush asks, also the one with nothing to write");
    commit(&world, 1001);
    let before = cluster.proof_count();
    cluster.set_fenced(true);
    client.write(2 * SLOT, &[3; 4096]);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(cluster.proof_count(), before);
    assert!(world.device.is_proven());
    assert!(world.device.waits_for_network(), "a layer of it is read there");
}

#[test]
fn who_was_shut_out_of_the_store_that_a_volume_is_leaving_answers_no_flush() {
    for is_written_before in [false, true] {
        let world = world();
        let cluster = cluster();
        let (distant, local): (Arc<dyn Store>, Arc<dyn Store>) = (cluster.clone(), world.faults.clone());
        swap(&world, 2, &distant);
        if is_written_before {
            world.device.write(0, &[1; 4096]).unwrap();
        }
        commit(&world, 1);
        swap(&world, 3, &local);
        world.device.write(SLOT, &[2; 4096]).unwrap();
        cluster.set_fenced(true);
        assert_eq!(world.device.flush().unwrap_err().code, "POOL_UNAVAILABLE");
        assert_eq!(world.device.flush().unwrap_err().code, "POOL_UNAVAILABLE");
        assert!(world.device.prove().is_err());
        cluster.set_fenced(false);
        world.device.flush().unwrap();
    }
}

#[test]
fn a_read_under_way_in_a_cluster_ends_well_while_its_layer_gets_another_place() {
    let world = world();
    let cluster = cluster();
    let (distant, local): (Arc<dyn Store>, Arc<dyn Store>) = (cluster.clone(), world.faults.clone());
    swap(&world, 2, &distant);
    world.device.write(0, &[7; 4096]).unwrap();
    commit(&world, 1001);
    swap(&world, 3, &local);
    commit(&world, 1);
    // The same bytes on this machine, under the same id.
    local.create_layer(LayerId([2; 16])).unwrap();
    let replica = local.open_layer(LayerId([2; 16]), atoll_io::OpenMode::ReadWrite).unwrap();
    replica.write(0, &[std::io::IoSlice::new(&[7; 4096])]).unwrap();

    // At its first read a layer is opened, which waits; from then on reads of it are begun.
    let mut warm = [0; 1];
    world.device.read(0, &mut warm).unwrap();
    let mut client = world.connect(|_| {});
    let cookie = client.send(READ, 0, 0, SLOT, &[]);
    cluster.wait_begun(1);
    world.device.add_layers(vec![layer(2, &local)]);
    assert!(!world.device.waits_for_network());
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            world.device.read_barrier();
            is_over.store(true, Ordering::SeqCst);
        });
        // Who comes now reads at the new place, and waits for nobody.
        let mut other = world.connect(|_| {});
        assert_eq!(other.read(0, SLOT), [7; 4096]);
        assert!(!is_over.load(Ordering::SeqCst), "somebody still reads at the old place");
        cluster.end_at(0);
    });
    let answer = client.answer(Some((0, SLOT as usize)));
    assert_eq!((answer.cookie, answer.error, answer.data), (cookie, 0, vec![7; 4096]));
    assert_eq!(Arc::strong_count(&cluster), 2, "the device has let go of the store");
}
