//! The client's thread, which steps in where the application does not call.

use crate::error::ClientError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two rounds while something is under way.
const BUSY_PERIOD: Duration = Duration::from_millis(1);
/// Time between two rounds while nothing is under way.
const IDLE_PERIOD: Duration = Duration::from_millis(5);

/// Recurring work of the background thread for a part of a client, such as a publisher.
pub(crate) trait BackgroundTask: Send + Sync {
    /// Does one round of the work. Returns true while something is under way.
    fn run_once(&self) -> bool;
}

#[derive(Default)]
struct Shared {
    tasks: Mutex<Vec<Weak<dyn BackgroundTask>>>,
    stop: AtomicBool,
}

/// Background thread of a client, which ends when this is dropped.
pub(crate) struct Background {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Background {
    pub(crate) fn start() -> Result<Self, ClientError> {
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("embarcadero-client".to_owned())
            .spawn(move || run(&of_thread))
            .map_err(ClientError::io("start the client's thread"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Runs `task` in every round, for as long as others hold it.
    pub(crate) fn add(&self, task: Weak<dyn BackgroundTask>) {
        self.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        self.wake();
    }

    fn wake(&self) {
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    while !shared.stop.load(Ordering::Relaxed) {
        let tasks: Vec<Arc<dyn BackgroundTask>> = {
            let mut tasks = shared.tasks.lock().unwrap_or_else(PoisonError::into_inner);
            tasks.retain(|task| task.strong_count() > 0);
            tasks.iter().filter_map(Weak::upgrade).collect()
        };
        let mut busy = false;
        for task in tasks {
            busy |= task.run_once();
        }
        std::thread::park_timeout(if busy { BUSY_PERIOD } else { IDLE_PERIOD });
    }
}
