//! Listeners and connections.
use crate::convert::{invalid, to_u32, to_u64, to_usize};
use crate::device::JsDevice;
use crate::map::JsFrozenMap;
use crate::promise::{Settler, rejected};
use atoll_engine::{
    Connection, Endpoint, Engine, EngineError, Listener, META_CONTEXT_COUNT_MAX, MetaContext, MetaContextKind, NBD_REQUEST_BYTES_MAX,
    NbdOptions, ReadPath, ReplyForm, Result, ServeEndReason, TlsConfig, spawn_named,
};
use atoll_map::FrozenMap;
use napi::bindgen_prelude::{ClassInstance, Env, Object, Uint8Array};
use napi_derive::napi;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// Accepts that may wait on one listener (I8).
const WAITING_ACCEPTS_MAX: usize = 16;

#[napi(object)]
pub struct JsListenerAddress {
    pub path: Option<String>,
    pub host: Option<String>,
    pub port: Option<u32>,
}

#[napi(object)]
pub struct JsServeEnd {
    pub reason: String,
    pub message: String,
}

#[napi(object)]
pub struct JsTlsPeer {
    pub protocol: String,
    pub cipher_suite: String,
    pub certificate: Option<Uint8Array>,
}

/// What a server shows and whom it lets in.
#[napi(js_name = "TlsConfig")]
pub struct JsTlsConfig {
    pub(crate) config: Arc<TlsConfig>,
}

type Accepting = Settler<Option<JsConnection>>;

/// A listener and the thread that accepts for it, one connection for each promise that asks.
#[napi(js_name = "Listener")]
pub struct JsListener {
    listener: Arc<Listener>,
    accepts: Mutex<Option<SyncSender<Accepting>>>,
}

impl JsListener {
    pub(crate) fn start(engine: Arc<Engine>, listener: Arc<Listener>) -> Result<JsListener> {
        let (sender, receiver) = sync_channel::<Accepting>(WAITING_ACCEPTS_MAX);
        let on_thread = listener.clone();
        spawn_named("atoll-accept", move || {
            while let Ok(settler) = receiver.recv() {
                let accepted = crate::convert::caught(|| engine.accept(&on_thread));
                settler.settle(accepted.map(|found| found.map(|connection| JsConnection { connection })));
            }
        })?;
        Ok(JsListener { listener, accepts: Mutex::new(Some(sender)) })
    }
}

#[napi]
impl JsListener {
    #[napi]
    pub fn address(&self) -> JsListenerAddress {
        match self.listener.endpoint() {
            Endpoint::Unix(path) => JsListenerAddress { path: Some(path.display().to_string()), host: None, port: None },
            Endpoint::Tcp(address) => {
                JsListenerAddress { path: None, host: Some(address.ip().to_string()), port: Some(u32::from(address.port())) }
            }
        }
    }

    #[napi]
    pub fn accept<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (settler, promise) = Accepting::new(env)?;
        match self.accepts.lock().as_ref() {
            None => settler.settle(Ok(None)),
            Some(sender) => match sender.try_send(settler) {
                Ok(()) => {}
                Err(TrySendError::Disconnected(settler)) => settler.settle(Ok(None)),
                Err(TrySendError::Full(settler)) => {
                    settler.settle(Err(invalid("accept", "called again and again", "awaited before it is called again")));
                }
            },
        }
        Ok(promise)
    }

    #[napi]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (settler, promise) = Settler::<()>::new(env)?;
        self.listener.close();
        drop(self.accepts.lock().take());
        settler.settle(Ok(()));
        Ok(promise)
    }
}

#[napi(js_name = "Connection")]
pub struct JsConnection {
    connection: Arc<Connection>,
}

#[napi]
impl JsConnection {
    #[napi]
    pub fn peer(&self) -> String {
        self.connection.peer().to_owned()
    }

    #[napi]
    pub fn read<'env>(&self, env: &'env Env, length_bytes: f64, timeout_ms: Option<f64>) -> napi::Result<Object<'env>> {
        let arguments = to_usize("lengthBytes", length_bytes).and_then(|length| {
            let timeout = timeout_ms.map(|timeout| to_u64("timeoutMs", timeout)).transpose()?;
            Ok((length, timeout.map(Duration::from_millis)))
        });
        let (length, timeout) = match arguments {
            Ok(arguments) => arguments,
            Err(error) => return rejected::<Option<Uint8Array>>(env, error),
        };
        let (settler, promise) = Settler::new(env)?;
        // The command keeps the connection: one that JavaScript forgets in the middle is not closed under its own read.
        let keep = self.connection.clone();
        self.connection.read(length, timeout, move |result| {
            settler.settle(result.map(|bytes| bytes.map(Uint8Array::new)));
            drop(keep);
        });
        Ok(promise)
    }

    /// The bytes are copied before the call returns.
    #[napi]
    pub fn write<'env>(&self, env: &'env Env, bytes: &[u8]) -> napi::Result<Object<'env>> {
        let (settler, promise) = Settler::new(env)?;
        let keep = self.connection.clone();
        self.connection.write(bytes.to_vec(), move |result| {
            settler.settle(result);
            drop(keep);
        });
        Ok(promise)
    }

    #[napi]
    pub fn start_tls<'env>(&self, env: &'env Env, config: &JsTlsConfig, timeout_ms: f64) -> napi::Result<Object<'env>> {
        let timeout = match to_u64("timeoutMs", timeout_ms) {
            Ok(timeout) => Duration::from_millis(timeout),
            Err(error) => return rejected::<JsTlsPeer>(env, error),
        };
        let (settler, promise) = Settler::new(env)?;
        let keep = self.connection.clone();
        self.connection.start_tls(config.config.clone(), timeout, move |result| {
            settler.settle(result.map(|peer| JsTlsPeer {
                protocol: peer.protocol,
                cipher_suite: peer.cipher_suite,
                certificate: peer.certificate.map(Uint8Array::new),
            }));
            drop(keep);
        });
        Ok(promise)
    }

    /// `ids`, `kinds` and `maps` belong together; only a kind that compares has a map.
    #[napi]
    #[allow(
        clippy::too_many_arguments,
        reason = "the one call that hands a negotiation's result over; an object would be copied field by field"
    )]
    pub fn serve_nbd<'env>(
        &self,
        env: &'env Env,
        device: &JsDevice,
        replies: String,
        ids: Vec<u32>,
        kinds: Vec<String>,
        maps: Vec<Option<ClassInstance<JsFrozenMap>>>,
        read_only: bool,
        request_bytes_max: Option<f64>,
    ) -> napi::Result<Object<'env>> {
        let maps = maps.iter().map(|map| map.as_ref().map(|map| map.map.clone())).collect();
        let options = to_contexts(ids, kinds, maps)
            .and_then(|contexts| to_options(&replies, contexts, read_only, request_bytes_max, device.engine.read_path()));
        let options = match options {
            Ok(options) => options,
            Err(error) => return rejected::<JsServeEnd>(env, error),
        };
        let (settler, promise) = Settler::new(env)?;
        let keep = self.connection.clone();
        self.connection.serve_nbd(device.device.clone(), options, move |result: Result<_>| {
            settler.settle(result.map(|end| JsServeEnd { reason: reason_name(end.reason).to_owned(), message: end.message }));
            drop(keep);
        });
        Ok(promise)
    }

    #[napi]
    pub fn drain<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.connection.drain();
        self.when_ended(env)
    }

    #[napi]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.connection.close();
        self.when_ended(env)
    }
}

impl JsConnection {
    fn when_ended<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (settler, promise) = Settler::<()>::new(env)?;
        self.connection.on_ended(move || settler.settle(Ok(())));
        Ok(promise)
    }
}

fn to_contexts(ids: Vec<u32>, kinds: Vec<String>, maps: Vec<Option<FrozenMap>>) -> Result<Vec<MetaContext>> {
    if ids.len() > META_CONTEXT_COUNT_MAX || kinds.len() != ids.len() || maps.len() != ids.len() {
        return Err(invalid("contexts", ids.len(), "ids, kinds and maps for at most 32"));
    }
    let contexts = ids.into_iter().zip(kinds).zip(maps).map(|((id, kind), map)| {
        let kind = match (kind.as_str(), map) {
            ("allocation", None) => MetaContextKind::Allocation,
            ("depth", None) => MetaContextKind::Depth,
            ("changed-since", Some(map)) => MetaContextKind::ChangedSince(map),
            (other, _) => return Err(invalid("kind", other, "allocation, depth, or changed-since with a map")),
        };
        Ok(MetaContext { id, kind })
    });
    contexts.collect()
}

fn to_options(
    replies: &str,
    contexts: Vec<MetaContext>,
    read_only: bool,
    request_bytes_max: Option<f64>,
    read_path: ReadPath,
) -> Result<NbdOptions> {
    let request_bytes_max = request_bytes_max.map_or(Ok(NBD_REQUEST_BYTES_MAX), |bytes| to_u32("requestBytesMax", bytes))?;
    if request_bytes_max > NBD_REQUEST_BYTES_MAX {
        return Err(EngineError::new("ARGUMENT_INVALID", libc::EINVAL, format!("requestBytesMax is above {NBD_REQUEST_BYTES_MAX}")));
    }
    let replies = match replies {
        "simple" => ReplyForm::Simple,
        "structured" => ReplyForm::Structured,
        "extended" => ReplyForm::Extended,
        other => return Err(invalid("replies", other, "simple, structured or extended")),
    };
    Ok(NbdOptions { replies, contexts, read_only, request_bytes_max, read_path })
}

fn reason_name(reason: ServeEndReason) -> &'static str {
    match reason {
        ServeEndReason::Disconnect => "disconnect",
        ServeEndReason::Eof => "eof",
        ServeEndReason::Error => "error",
        ServeEndReason::Closed => "closed",
    }
}
